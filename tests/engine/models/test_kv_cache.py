"""Decoding with a cache: classes with keys, windows, states and both; those that cannot are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_record
from opd_mcp.engine.context import Context, RolloutInputs
from opd_mcp.engine.generation import generator, prefill
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.losses.objectives import target_logprobs
from opd_mcp.engine.models.kv_cache import decoding_problem, prefilled, roomy_cache
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.runtime import Runtime
from opd_mcp.identity.models import UNDECODABLE
from opd_mcp.schemas.errors import PathError, RunError
from opd_mcp.schemas.recipes import Recipe, Sampling
from opd_mcp.schemas.resolve import resolve_recipe

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DECODED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": WINDOW,
    "mistral": {"sliding_window": 6},
    "gpt_oss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": {"state_size": 8, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 8},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "shared_intermediate_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 8,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def random_model(name: str, **settings: Any) -> PreTrainedModel:
    config = type(AutoConfig.for_model(name))(**{**SMALL, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def saved(example: Path, tmp_path: Path) -> Callable[..., Path]:
    """`saved(name, **settings)`: a random model of this type with the example's tokenizer."""

    def made(name: str, **settings: Any) -> Path:
        vocabulary = json.loads((example / "student" / "config.json").read_text())["vocab_size"]
        directory = Path(shutil.copytree(example / "student", tmp_path / name))
        (directory / "model.safetensors").unlink()
        random_model(name, **{**settings, "vocab_size": vocabulary}).save_pretrained(directory)
        return directory

    return made


@pytest.mark.parametrize("name", DECODED)
def test_generated_log_probs_are_those_of_the_whole_sequence(name: str) -> None:
    """Prompts of four lengths, rows that end at different steps and leave the batch."""
    model = random_model(name, **DECODED[name])
    assert decoding_problem(model) is None
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [20, 21, 22, 23, 24, 25, 26]] * 3
    settings = GenerationSettings(Sampling(max_new_tokens=12, temperature=4.0), list(range(2, 10)), 12, 0, "test")
    drawn = generator.generate(model, prompts, settings)
    assert len({len(row.response_ids) for row in drawn}) > 3, "rows end at different steps"
    with torch.no_grad():
        for prompt, response in zip(prompts, drawn, strict=True):
            ids = torch.tensor([prompt + response.response_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = target_logprobs(logits, ids[0, len(prompt) :])
            assert np.allclose(response.logprobs, expected, atol=2e-3)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("name", DECODED)
def test_prompts_are_taken_in_piece_by_piece(name: str, width: int) -> None:
    """The last piece may be shorter; a prompt may begin in any of them, and windows end in between."""
    model = random_model(name, **DECODED[name])
    prompts = [[*range(5, 22)], [23, 24], [*range(30, 41)]]
    ids, mask = prefill.left_padded(prompts, model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = prefilled(model, roomy_cache(model.config), ids, mask, positions, ids.shape[1])
        hidden = prefilled(model, roomy_cache(model.config), ids, mask, positions, width)
    assert torch.allclose(hidden, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_is_not_decoded_rightly_is_found_out(name: str) -> None:
    problem = decoding_problem(random_model(name, **REFUSED[name]))
    assert problem is not None
    assert problem.startswith("decoding with a cache")
    assert name in UNDECODABLE, "and a plan refuses it by its name"


def test_states_that_are_left_with_other_rows_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before, when rows that ended kept their place among the states."""
    from opd_mcp.engine.models import kv_cache

    assert decoding_problem(random_model("qwen3")) is None
    monkeypatch.setattr(kv_cache, "keep_rows", lambda cache, kept: cache.reorder_cache(kept.flip(0)))
    problem = decoding_problem(random_model("qwen3"))
    assert problem is not None
    assert "differs from the whole sequence" in problem


@pytest.fixture
def recipe() -> Recipe:
    return resolve_recipe("demo", {"rollout.count": 8, "rollout.sampling.max_new_tokens": 8})


def test_no_rollout_is_drawn_by_a_class_that_is_not_decoded_rightly(
    saved: Callable[..., Path], recipe: Recipe, example: Path, tmp_path: Path
) -> None:
    student = saved("rwkv", **REFUSED["rwkv"])
    inputs = RolloutInputs(student=student, prompts=example / "opd.jsonl")
    with pytest.raises(PathError, match=r"unsupported_model.*'rwkv' cannot generate here.*padding"):
        stages.rollout(recipe.rollout, inputs, tmp_path / "rollouts", Context(recipe.runtime, recipe.prompting))
    assert not list((tmp_path / "rollouts").glob("*.parquet"))


def test_a_class_that_no_list_names_is_tried_when_it_is_loaded(
    saved: Callable[..., Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = saved("rwkv", **REFUSED["rwkv"])
    monkeypatch.delitem(UNDECODABLE, "rwkv")
    load_model(student, runtime)  # as a teacher that only scores it can be used
    with pytest.raises(PathError, match=r"unsupported_model.*differs from the whole sequence"):
        load_model(student, runtime, generates=True)


def test_a_hybrid_student_draws_rollouts_that_its_scorer_agrees_with(
    saved: Callable[..., Path], recipe: Recipe, example: Path, tmp_path: Path
) -> None:
    inputs = RolloutInputs(student=saved("lfm2", **DECODED["lfm2"]), prompts=example / "opd.jsonl")
    stages.rollout(recipe.rollout, inputs, tmp_path / "rollouts", Context(recipe.runtime, recipe.prompting))
    gap = read_record(tmp_path / "rollouts").engine_gap
    assert gap is not None
    assert gap.mean < 1e-4


def shifted_positions(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda model, cache, ids, mask, positions: real(model, cache, ids, mask, positions + 3 * (ids.shape[1] == 1))


def first_tokens_alone(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda model, cache, ids, mask, positions: real(
        model,
        generator.roomy_cache(model.config) if ids.shape[1] == 1 else cache,
        ids,
        mask[:, -ids.shape[1] :],
        positions,
    )


def tokens_of_other_rows(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda model, cache, ids, mask, positions: real(
        model, cache, ids.flip(0) if ids.shape[1] == 1 else ids, mask, positions
    )


@pytest.mark.parametrize("wrong", [shifted_positions, first_tokens_alone, tokens_of_other_rows])
def test_a_generator_that_disagrees_with_the_scorer_stops_the_build(
    wrong: Callable[..., Any], recipe: Recipe, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "continued", wrong(generator.continued))
    inputs = RolloutInputs(student=example / "teacher", prompts=example / "opd.jsonl")
    with pytest.raises(RunError, match=r"engine_disagrees.*nats on average.*Fix: Set 'runtime.dtype'"):
        stages.rollout(recipe.rollout, inputs, tmp_path / "rollouts", Context(recipe.runtime, recipe.prompting))
    assert not (tmp_path / "rollouts" / "rollouts.json").exists()
