"""What a rank holds while it loads a model and trains: its part, and the vocabulary that it gathers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic" / "student"

# 46.6 million weights, of which the untied vocabulary is 37.7 million
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "head_dim": 96,
    "intermediate_size": 576,
}


CASE = {"what": "memory", "sizes": SIZES}


@pytest.fixture(scope="module")
def alone(on_ranks) -> int:
    """What one process adds in the same training, in bytes."""
    return on_ranks(1, {**CASE, "alone": True})[0][0]


def share_of_a_rank(answers: list[list[int]], alone: int, record_property) -> float:
    share = max(rank[0] for rank in answers) / alone
    record_property("bytes_of_one_process", alone)
    record_property("share_of_a_rank", share)
    return share


def test_a_rank_of_two_that_divides_the_vocabulary_in_its_steps_peaks_at_six_tenths(
    on_ranks, alone: int, record_property
) -> None:
    assert share_of_a_rank(on_ranks(2, {**CASE, "divided": True}), alone, record_property) <= 0.6


def test_a_rank_of_two_peaks_at_three_quarters_of_one_process(on_ranks, alone: int, record_property) -> None:
    assert share_of_a_rank(on_ranks(2, CASE), alone, record_property) <= 0.75


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_rank_holds_the_model_while_it_is_loaded_and_divided(on_ranks, tmp_path, dtype, record_property) -> None:
    """Weights are mapped from their files; what a rank copies are its own rows, and one layer at a time."""
    path = shutil.copytree(EXAMPLE, tmp_path / "model")
    sizes = {**SIZES, "num_hidden_layers": 16, "vocab_size": 8192, "intermediate_size": 1536}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    for answers in on_ranks(2, {"what": "loading", "path": str(path)}):
        found = answers[0]
        record_property("share_of_the_model", found["most"] / found["whole"])
        assert found["same"]
        assert found["packs"]
        assert found["most"] < 0.85 * found["whole"], "half are its own; the allocator's gaps differ from run to run"
