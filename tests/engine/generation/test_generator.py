"""Bulk generation against transformers' own, and its log-probs against a forward pass."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.generation import prefill
from opd_mcp.engine.generation.batch_state import Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.losses.objectives import target_logprobs
from opd_mcp.engine.models import kv_cache
from opd_mcp.schemas.recipes import Sampling

VOCAB, EOS = 13, 1
PROMPTS = [[5, 6, 7], [2], [3, 4, 5, 6, 7, 8, 9], [10, 11], [4, 4, 4, 4]] * 6


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(VOCAB, seed=3, dtype=torch.float32)


def drawn(model: PreTrainedModel, prompts: list[list[int]], **changes: object) -> list[Generated]:
    settings = GenerationSettings(Sampling(max_new_tokens=12), [EOS], batch_size=8, seed=0, scope="test")
    return generate(model, prompts, replace(settings, **changes))


def test_greedy_equals_transformers_generate(model: PreTrainedModel) -> None:
    ours = drawn(model, PROMPTS, sampling=Sampling(temperature=0, max_new_tokens=12))
    for prompt, row in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS)[0]
        assert row.response_ids == theirs[len(prompt) :].tolist()


def test_small_batches_are_admitted_by_length_and_answered_in_the_prompts_order(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=12)
    whole, widths = drawn(model, PROMPTS, sampling=greedy), []
    pad = prefill.left_padded

    def noting(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        widths.extend(len(prompt) for prompt in prompts)
        return pad(prompts, device)

    monkeypatch.setattr(prefill, "left_padded", noting)
    assert [row.response_ids for row in drawn(model, PROMPTS, sampling=greedy, batch_size=2)] == [
        row.response_ids for row in whole
    ]
    assert widths == sorted((len(prompt) for prompt in PROMPTS), reverse=True)


def test_log_probs_are_those_of_a_forward_pass_whatever_the_sampling(model: PreTrainedModel) -> None:
    """T = 1 and untruncated, though the tokens were drawn at T = 0.7 and top-p 0.8."""
    for prompt, row in zip(
        PROMPTS, drawn(model, PROMPTS, sampling=Sampling(temperature=0.7, top_p=0.8, max_new_tokens=12)), strict=True
    ):
        ids = torch.tensor([prompt + row.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = target_logprobs(logits, ids[0, len(prompt) :])
        assert np.allclose(row.logprobs, expected, atol=1e-5)


def test_responses_end_with_eos_or_at_the_limit(model: PreTrainedModel) -> None:
    rows = drawn(model, PROMPTS)
    assert {row.finish_reason for row in rows} == {"eos", "length"}, "the example has both"
    for row in rows:
        assert len(row.logprobs) == len(row.response_ids)
        assert EOS not in row.response_ids[:-1]
        assert (row.response_ids[-1] == EOS) == (row.finish_reason == "eos")
        assert row.finish_reason == "eos" or len(row.response_ids) == 12


def test_several_stop_tokens(model: PreTrainedModel) -> None:
    rows = drawn(model, PROMPTS, eos_token_ids=[EOS, 2, 3])
    ends = {row.response_ids[-1] for row in rows if row.finish_reason == "eos"}
    assert ends <= {EOS, 2, 3}
    assert len(ends) > 1


def test_same_seed_same_rollouts_other_seed_others(model: PreTrainedModel) -> None:
    assert drawn(model, PROMPTS) == drawn(model, PROMPTS)
    assert drawn(model, PROMPTS) != drawn(model, PROMPTS, seed=1)
    assert drawn(model, PROMPTS) != drawn(model, PROMPTS, scope="other")


def test_the_batch_changes_no_greedy_response_and_log_probs_by_rounding_alone(model: PreTrainedModel) -> None:
    """What a plan's choice of the batch may change: rounding, and the random stream that sampled tokens come from."""
    greedy = Sampling(temperature=0, max_new_tokens=12)
    whole = drawn(model, PROMPTS, sampling=greedy)
    for batch in (1, 2, 3):
        rows = drawn(model, PROMPTS, sampling=greedy, batch_size=batch)
        assert [row.response_ids for row in rows] == [row.response_ids for row in whole]
        for row, other in zip(rows, whole, strict=True):
            assert np.allclose(row.logprobs, other.logprobs, atol=1e-5)
    assert drawn(model, PROMPTS, batch_size=2) != drawn(model, PROMPTS), "each batch has a random stream of its own"


def test_no_pass_takes_more_tokens_of_prompts_than_fit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the responses are those of one pass over all of them."""
    sizes = []
    real = kv_cache.continued

    def continued(model, cache, ids, *given):
        sizes.append(ids.numel())
        return real(model, cache, ids, *given)

    monkeypatch.setattr(kv_cache, "continued", continued)
    monkeypatch.setattr(prefill, "packs", lambda model: True)
    whole = drawn(model, PROMPTS, sampling=Sampling(max_new_tokens=3))
    assert max(sizes) == 8 * 7
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 20)
    sizes.clear()
    pieces = drawn(model, PROMPTS, sampling=Sampling(max_new_tokens=3))
    assert max(sizes) == 16, "two tokens of eight rows"
    assert [row.response_ids for row in pieces] == [row.response_ids for row in whole]
    for row, other in zip(pieces, whole, strict=True):
        assert np.allclose(row.logprobs, other.logprobs, atol=1e-5)


def test_padded_ids_are_never_drawn(model: PreTrainedModel) -> None:
    rows = drawn(model, PROMPTS, sampling=Sampling(temperature=5.0, max_new_tokens=12), valid_vocab=6)
    assert max(token for row in rows for token in row.response_ids) < 6


def test_tokens_are_drawn_with_the_model_s_probabilities(model: PreTrainedModel) -> None:
    rows = drawn(model, [[5, 6, 7]] * 4000, sampling=Sampling(max_new_tokens=1), batch_size=4000)
    counts = np.bincount([row.response_ids[0] for row in rows], minlength=VOCAB) / 4000
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).numpy()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_rows_can_be_scored_as_sequences(model: PreTrainedModel) -> None:
    rows = drawn(model, PROMPTS)
    sequences = build_sequences(PROMPTS, [row.response_ids for row in rows])
    assert sequences.response_lengths().tolist() == [len(row.response_ids) for row in rows]
