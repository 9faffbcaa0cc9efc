"""Decoding in buffers of fixed size against decoding with a cache that grows; on the CPU each step runs as it is."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_mcp.engine.generation import generator, replay
from opd_mcp.engine.generation.batch_state import BatchState, Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.schemas.memory import JOINING_ROOM, WINDOW_ROOM
from opd_mcp.schemas.recipes import Sampling

VOCAB, EOS, LIMIT = 13, 1, 20
PROMPTS = [[5, 6, 7], [2], [3, 4, 5, 6, 7, 8, 9], [10, 11], [4, 4, 4, 4]] * 6


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    made = tiny_model(VOCAB, seed=3, dtype=torch.float32)
    assert use_packed_attention(made)
    return made


@pytest.fixture
def fixed_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "replays", lambda model, cache: True)
    monkeypatch.setattr(replay, "LEAST_STEPS", 1000)  # nothing to record on without CUDA
    monkeypatch.setattr(replay, "SEGMENT", 5)
    monkeypatch.setattr(replay, "LOOK_EVERY", 2)


def drawn(model: PreTrainedModel, batch: int = len(PROMPTS), **changes: object) -> list[Generated]:
    sampling = Sampling(**({"max_new_tokens": LIMIT} | changes))
    return generate(model, PROMPTS, GenerationSettings(sampling, [EOS, 2], batch, 0, "test"))


def require_true_log_probs(model: PreTrainedModel, rows: list[Generated]) -> None:
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([prompt + row.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert np.allclose(row.logprobs, expected, atol=1e-5)


def test_the_same_greedy_responses_whatever_the_segments(
    model: PreTrainedModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = drawn(model, temperature=0)
    assert {row.finish_reason for row in growing} == {"eos", "length"}, "the example has both"
    request.getfixturevalue("fixed_buffers")
    for segment in (1, 5, 64):
        monkeypatch.setattr(replay, "SEGMENT", segment)
        fixed = drawn(model, temperature=0)
        assert [(row.response_ids, row.finish_reason) for row in fixed] == [
            (row.response_ids, row.finish_reason) for row in growing
        ]
        for ours, theirs in zip(fixed, growing, strict=True):
            assert np.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_log_probs_are_those_of_a_forward_pass(model: PreTrainedModel, fixed_buffers: None) -> None:
    require_true_log_probs(model, drawn(model, temperature=0.7, top_p=0.8))


def test_same_seed_same_rollouts(model: PreTrainedModel, fixed_buffers: None) -> None:
    assert drawn(model) == drawn(model)


def test_finished_rows_are_dropped_at_a_segments_end(
    model: PreTrainedModel, fixed_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, take = [], BatchState.take

    def noting(state: BatchState, logits: torch.Tensor) -> torch.Tensor:
        rows.append(len(logits))
        return take(state, logits)

    monkeypatch.setattr(BatchState, "take", noting)
    drawn(model)
    segments = [rows[start : start + 5] for start in range(1, len(rows), 5)]
    assert all(len(set(segment)) == 1 for segment in segments)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]


@pytest.mark.parametrize(("batch", "joining_bytes"), [(4, 1 << 30), (4, 0), (1, 1 << 30), (7, 9000)])
def test_rows_that_join_are_drawn_as_in_batches(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    batch: int,
    joining_bytes: int,
) -> None:
    """Greedily, whatever their number and while buffers are small enough, or once they no longer are."""
    growing = drawn(model, temperature=0)
    request.getfixturevalue("fixed_buffers")
    monkeypatch.setattr(replay, "JOINING_BYTES", joining_bytes)
    for segment in (3, 64):
        monkeypatch.setattr(replay, "SEGMENT", segment)
        joined = drawn(model, batch, temperature=0)
        assert [(row.response_ids, row.finish_reason) for row in joined] == [
            (row.response_ids, row.finish_reason) for row in growing
        ]
        for ours, theirs in zip(joined, growing, strict=True):
            assert np.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_log_probs_of_rows_that_join_are_those_of_a_forward_pass(model: PreTrainedModel, fixed_buffers: None) -> None:
    joined = drawn(model, 4, temperature=0.7, top_p=0.8)
    assert joined == drawn(model, 4, temperature=0.7, top_p=0.8)
    assert joined != drawn(model, 5, temperature=0.7, top_p=0.8), "a part has one random stream"
    require_true_log_probs(model, joined)


def test_a_part_is_drawn_the_same_by_any_process(model: PreTrainedModel, fixed_buffers: None) -> None:
    """Alone, as a helper or a rank draws it, and after others."""
    how = GenerationSettings(Sampling(max_new_tokens=LIMIT), [EOS, 2], 3, 0, "test")
    whole, parts = generate(model, PROMPTS, how), generator.parts_of(model, PROMPTS, 3)
    assert len(parts) == 3
    for number in (2, 0, 1):
        part = generator.drawn_part(SimpleNamespace(model=model), PROMPTS, how, number)  # type: ignore[arg-type]
        expected = [whole[row] for row in parts[number]]
        assert part["ids"].tolist() == [token for row in expected for token in row.response_ids]
        assert part["logprobs"].tolist() == pytest.approx([value for row in expected for value in row.logprobs], abs=0)
        assert part["lengths"].tolist() == [len(row.response_ids) for row in expected]


def test_places_are_taken_again_as_rows_end(
    model: PreTrainedModel, fixed_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer steps than batches that end with their last row; without room to join as many as those."""
    steps = []
    step = replay.Segment.step
    monkeypatch.setattr(replay.Segment, "step", lambda segment: (steps.append(1), step(segment))[1])
    ended = []
    how = GenerationSettings(Sampling(max_new_tokens=LIMIT), [EOS, 2], 8, 0, "test")
    generate(model, PROMPTS, how, ended.append)
    joining = len(steps)
    monkeypatch.setattr(replay, "JOINING_BYTES", 0)
    generate(model, PROMPTS, how)
    assert joining < 0.7 * (len(steps) - joining)
    assert ended == sorted(ended)
    assert ended[-1] == len(PROMPTS)
    assert len(set(ended)) > 3, "it is told while the part is drawn"


def test_buffers_with_rows_that_join_are_no_longer_than_the_longest_row(
    model: PreTrainedModel, fixed_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides what a plan counts."""
    assert JOINING_ROOM == replay.ALIGNMENT
    extents = []
    following = replay.Columns.next

    def noting(columns: replay.Columns, *given: object) -> replay.Columns:
        after = following(columns, *given)  # type: ignore[arg-type]
        extents.append(after.mask.shape[3])
        return after

    monkeypatch.setattr(replay.Columns, "next", noting)
    monkeypatch.setattr(replay, "ALIGNMENT", 2)
    drawn(model, 4)
    assert max(extents) <= max(map(len, PROMPTS)) + LIMIT + 2 * 2


def test_a_part_holds_several_batches_where_rows_can_join(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [len(part) for part in generator.parts_of(model, PROMPTS, 7)] == [7, 7, 7, 7, 2]
    monkeypatch.setattr(generator, "replays", replay.has_fixed_steps)
    assert [len(part) for part in generator.parts_of(model, PROMPTS, 7)] == [28, 2]


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}


def windowed(kind: str, window: int) -> PreTrainedModel:
    """A random model with this window: in each layer, or in the first of two."""
    torch.manual_seed(1)
    changes = {**SMALL, "sliding_window": window}
    if kind == "mistral":
        made: PreTrainedModel = MistralForCausalLM(MistralConfig(**changes))
    elif kind == "gemma3":
        made = Gemma3ForCausalLM(Gemma3TextConfig(**changes, **MIXED))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**changes, **MIXED, use_sliding_window=True))
    assert use_packed_attention(made.double().eval())
    return made


@given(
    st.sampled_from(["mistral", "gemma3", "qwen3"]),
    st.integers(2, 24),
    st.integers(1, 12),
    st.lists(st.integers(1, 14), min_size=1, max_size=7),
    st.integers(2, 24),
    st.integers(1, 4),
)
@settings(max_examples=20, deadline=None)
def test_windows_in_fixed_buffers(
    kind: str, window: int, segment: int, lengths: list[int], limit: int, batch: int
) -> None:
    """Whatever the window, the segments, the prompts, the limit and who joins: the tokens of a cache that grows."""
    model = windowed(kind, window)
    prompts = [[2 + (3 * row + number) % (VOCAB - 2) for number in range(n)] for row, n in enumerate(lengths)]
    how = GenerationSettings(Sampling(max_new_tokens=limit, temperature=0), [EOS], len(prompts), 0, "test")
    growing = generate(model, prompts, how)
    how = dataclasses.replace(how, batch_size=batch)
    assert replay.has_fixed_steps(model, generator.roomy_cache(model.config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "replays", replay.has_fixed_steps)
        patch.setattr(replay, "LEAST_STEPS", 1000)
        patch.setattr(replay, "SEGMENT", segment)
        patch.setattr(replay, "LOOK_EVERY", 2)
        fixed = generate(model, prompts, how)
    for ours, theirs in zip(fixed, growing, strict=True):
        assert (ours.response_ids, ours.finish_reason) == (theirs.response_ids, theirs.finish_reason)
        assert np.allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_buffers_of_a_window_hold_no_more_than_the_window_and_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WINDOW_ROOM == replay.SEGMENT + replay.ALIGNMENT, "what a plan counts"
    extents = []
    move = replay.Columns.moved

    def noting(columns: replay.Columns, *given: object) -> torch.Tensor:
        states = move(columns, *given)  # type: ignore[arg-type]
        extents.append((columns.window, states.shape[2]))
        return states

    monkeypatch.setattr(replay.Columns, "moved", noting)
    monkeypatch.setattr(generator, "replays", replay.has_fixed_steps)
    monkeypatch.setattr(replay, "LEAST_STEPS", 1000)
    monkeypatch.setattr(replay, "SEGMENT", 4)
    monkeypatch.setattr(replay, "ALIGNMENT", 1)
    how = GenerationSettings(Sampling(max_new_tokens=LIMIT, temperature=0), [], 1, 0, "test")
    generate(windowed("gemma3", 5), [list(range(2, 12))], how)
    assert {extent for window, extent in extents if window == 5} == {5 + 4, 5 + 3}
    assert max(extent for window, extent in extents if window is None) == 10 + LIMIT - 1


def test_layers_with_chunks_have_no_fixed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their caches are of the class that windows have, but a token does not see across a chunk's begin."""
    monkeypatch.setattr(replay, "packs", lambda model: True)
    chunked = {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 4,
        "num_local_experts": 1,
    }
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL, **chunked))
    assert not replay.has_fixed_steps(model, generator.roomy_cache(model.config))


def test_only_cuda_replays(model: PreTrainedModel) -> None:
    cache = generator.roomy_cache(model.config)
    assert not replay.replays(model, cache)


class Graph:
    """Stands in for a CUDA graph."""

    def register_generator_state(self, generator: torch.Generator) -> None:
        """The CPU's generators need no registration."""

    def replay(self) -> None:
        """Nothing was recorded."""


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The modes that torch was told to watch for waiting in."""
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return modes


def test_a_step_that_does_not_wait_is_recorded_and_replayed(without_a_gpu: list[object]) -> None:
    steps: list[int] = []
    recording = replay.Recording(torch.Generator())
    recording.try_step(lambda: steps.append(1))
    assert steps == [1]
    assert without_a_gpu == ["error", 0]
    assert recording.of(lambda: None) == recording.graph.replay
    recording.try_step(lambda: steps.append(2))
    assert steps == [1, 2]
    assert without_a_gpu == ["error", 0], "it is watched once"


def test_a_step_that_waits_is_taken_as_it_is_and_told_once(
    without_a_gpu: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is recorded: a recording that fails would leave torch's generator in the middle of it."""
    taken = []

    def waiting() -> None:
        if without_a_gpu[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        taken.append(1)

    recording = replay.Recording(torch.Generator())
    for _ in range(2):
        recording.try_step(waiting)
        assert recording.of(waiting) is waiting
    assert len(taken) == 2
    assert recording.graph is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "synchronizing" in caplog.text


def test_recorded_steps_follow_two_that_are_taken_as_they_are(
    model: PreTrainedModel, fixed_buffers: None, without_a_gpu: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recording that hands the step back the tokens are those of a loop without recordings."""
    expected = drawn(model, temperature=0)
    recorded: list[Callable[[], None]] = []

    def of(recording: replay.Recording, step: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step)
        return step

    monkeypatch.setattr(replay.Recording, "of", of)
    monkeypatch.setattr(replay, "LEAST_STEPS", 2)
    assert drawn(model, temperature=0) == expected
    assert recorded
