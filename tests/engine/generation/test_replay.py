"""Decoding in buffers of fixed size against decoding with a cache that grows; on the CPU each step runs as it is."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.generation import generator, replay
from opd_mcp.engine.generation.batch_state import BatchState, Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.attention import use_packed_attention
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
    monkeypatch.setattr(replay, "LEAST_STEPS", LIMIT)  # nothing to record on without CUDA
    monkeypatch.setattr(replay, "SEGMENT", 5)
    monkeypatch.setattr(replay, "LOOK_EVERY", 2)


def drawn(model: PreTrainedModel, **changes: object) -> list[Generated]:
    sampling = Sampling(**({"max_new_tokens": LIMIT} | changes))
    return generate(model, PROMPTS, GenerationSettings(sampling, [EOS, 2], 30, 0, "test"))


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
    for prompt, row in zip(PROMPTS, drawn(model, temperature=0.7, top_p=0.8), strict=True):
        ids = torch.tensor([prompt + row.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert np.allclose(row.logprobs, expected, atol=1e-5)


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
