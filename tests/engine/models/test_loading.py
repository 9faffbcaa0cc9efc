"""Which classes are loaded, and which are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.loading import TOKENIZER_FILES, load_model
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
