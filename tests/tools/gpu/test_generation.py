"""The part of `tools/gpu/check.py` that times sampling, on a CPU: everything but the speeds themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tools.gpu import generation

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "gpu" / "check.py"
VARIANTS = {"ours", "ours_step_by_step", "hf_static_cache", "hf_continuous_batching"}
CPU = torch.device("cpu")
STOPS = [3, 7]


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=12, tie_word_embeddings=True, **sizes, **heads)).eval()


def test_the_script_reports_all_three_on_both_workloads(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--skip-demo", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())["generation"]
    assert (found["rows"], found["new_tokens"]) == (4, 8)
    for name in ("fixed_length", "stop_tokens"):
        assert found[name].keys() == VARIANTS
        assert all(rate > 0 for rate in found[name].values()), found[name]


@pytest.mark.parametrize("name", ["our_variant", "static_variant", "continuous_variant"])
def test_each_variant_draws_to_the_limit_or_to_a_stop_token(model, name: str) -> None:
    """Without stop tokens every row has all tokens; with two of twelve most rows end before."""
    work = generation.Workload(6, (2, 5), 16, rounds=1)
    prompts = generation.random_prompts(work, 12)
    assert {2 <= len(prompt) <= 5 for prompt in prompts} == {True}
    whole = getattr(generation, name)(model, prompts, [12], work)
    assert whole(0) == 6 * 16
    model.destroy_cached_continuous_batching_manager()
    stopping = getattr(generation, name)(model, prompts, STOPS, work)
    assert 6 <= stopping(0) < 6 * 16
    model.destroy_cached_continuous_batching_manager()


def test_the_twin_has_the_same_weights_under_sdpa(model) -> None:
    from opd_mcp.engine.models.attention import use_packed_attention

    ids = torch.arange(8)[None]
    expected = model(ids).logits
    assert use_packed_attention(model)
    twin = generation.sdpa_twin(model)
    assert (twin.config._attn_implementation, twin.training) == ("sdpa", False)
    assert model.config._attn_implementation != "sdpa"
    assert torch.equal(twin(ids).logits, expected)


def test_tokens_are_counted_with_the_first_stop_token_of_each_row() -> None:
    drawn = torch.tensor([[1, 2, 4, 5], [1, 7, 0, 0], [3, 3, 3, 3], [1, 2, 4, 7]])
    assert generation.tokens_until_stop(drawn, STOPS) == 4 + 2 + 1 + 4


def test_a_failed_request_is_no_speed(model) -> None:
    """Continuous batching logs a failure and gives back what it has: that must not be timed as if it were all."""
    work = generation.Workload(3, (2, 5), 4, rounds=1)
    prompts = [[1, 2], [3, 12], [4]]  # the vocabulary ends at 11
    variant = generation.continuous_variant(model, prompts, STOPS, work)
    found = generation.interleaved_rates({"hf_continuous_batching": variant, "ours": lambda seed: 1}, CPU, 1)
    assert found["hf_continuous_batching"].startswith("not run: RuntimeError: ")
    assert "index out of range" in found["hf_continuous_batching"]
    assert found["ours"] > 0


def test_why_a_variant_is_impossible_is_text_and_ours_must_run() -> None:
    def broken(seed: int) -> int:
        raise RuntimeError("no compiler\n  was found")

    found = generation.interleaved_rates({"hf_static_cache": broken, "ours": lambda seed: 5}, CPU, 2)
    assert found["hf_static_cache"] == "not run: RuntimeError: no compiler was found"
    assert found["ours"] > 0
    with pytest.raises(RuntimeError, match="no compiler"):
        generation.interleaved_rates({"ours": broken}, CPU, 1)
