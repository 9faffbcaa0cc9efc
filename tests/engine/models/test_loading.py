"""Which classes are loaded, and which are refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.loading import TOKENIZER_FILES, load_model, widened_as_used
from opd_mcp.engine.runtime import Runtime
from opd_mcp.schemas.errors import PathError

SMALL = {
    "vocab_size": 22,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
}


def saved(model: PreTrainedModel, example: Path, output: Path) -> Path:
    model.save_pretrained(output)
    for name in TOKENIZER_FILES:
        if (example / "teacher" / name).exists():
            shutil.copyfile(example / "teacher" / name, output / name)
    return output


def test_soft_capped_logits_are_the_head_s(example: Path, tmp_path: Path, runtime: Runtime) -> None:
    torch.manual_seed(0)
    path = saved(Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)), example, tmp_path / "gemma")
    model = load_model(path, runtime).model
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    assert 1.5 < expected.abs().max() <= 2.0
    assert torch.allclose(head_logits(model, hidden), expected, atol=1e-5)


def test_logits_that_are_changed_after_the_head_are_refused_by_name(
    example: Path, tmp_path: Path, runtime: Runtime
) -> None:
    torch.manual_seed(0)
    config = CohereConfig(**SMALL, logit_scale=0.25)
    path = saved(CohereForCausalLM(config), example, tmp_path / "cohere")
    with pytest.raises(PathError, match="CohereForCausalLM") as caught:
        load_model(path, runtime)
    assert caught.value.code == "unsupported_head"


def test_a_model_that_ranks_divide_stays_as_stored_and_is_judged_in_float32(
    example: Path, tmp_path: Path, runtime: Runtime
) -> None:
    """Its class is judged by numbers as exact as one process's, a module at a time."""
    torch.manual_seed(0)
    divides = replace(runtime, divides=True)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)).to(torch.bfloat16)
    path = saved(gemma, example, tmp_path / "gemma")
    mapped, plain = (load_model(path, given, for_training=True).model for given in (divides, runtime))
    assert ({w.dtype for w in mapped.parameters()}, {w.dtype for w in plain.parameters()}) == (
        {torch.bfloat16},
        {torch.float32},
    )
    ids = torch.arange(2, 12)[None]
    with torch.no_grad(), widened_as_used(mapped):
        assert torch.equal(mapped(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert {weight.dtype for weight in mapped.parameters()} == {torch.bfloat16}
    path = saved(
        CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)).to(torch.bfloat16), example, tmp_path / "no"
    )
    with pytest.raises(PathError, match="CohereForCausalLM"):
        load_model(path, divides, for_training=True)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "nosuch", "architectures": ["NosuchForCausalLM"]},
        {"model_type": "t5", "architectures": ["T5Model"]},
        {"hidden_act": "nosuch_act"},
        {"head_dim": 0},
        {"rms_norm_eps": 0},
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"num_attention_heads": 2**31},
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name(
    example: Path, tmp_path: Path, runtime: Runtime, change: dict[str, object]
) -> None:
    path = Path(shutil.copytree(example / "student", tmp_path / "odd"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PathError, match="transformers cannot build this model") as caught:
        load_model(path, runtime)
    assert caught.value.code == "unsupported_model"
