"""What a run tells about its speed, and what it does when memory runs out."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, RowObjective
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training import loop
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import StepResult, StepSettings, sft_metrics, training_flops
from opd_mcp.schemas.recipes import OptimizerRecipe
from opd_mcp.schemas.reports import TrainingSummary

VOCAB, STEPS = 13, 3


class ListeningReporter(SilentReporter):
    def __init__(self) -> None:
        self.alerts: list[str] = []

    def alert(self, code: str, message: str) -> None:
        self.alerts.append(code)


def trained(
    model: PreTrainedModel, runtime: Runtime, reporter: SilentReporter, micro_batch_tokens: int
) -> TrainingSummary:
    rng = np.random.default_rng(0)
    rows = [[rng.integers(2, VOCAB, size=size).tolist() for size in (3, 5, 2, 8)] for _ in range(2)]
    data = StepData(build_sequences(*rows), np.arange(4))

    def same_rows(first: int) -> Iterator[StepData]:
        while True:
            yield data

    settings = LoopSettings(STEPS, OptimizerRecipe(learning_rate=1e-3), "token", micro_batch_tokens)
    context = Context(reporter=reporter)
    return train(model, TrainingTask(settings, same_rows, SFT_OBJECTIVE, sft_metrics), runtime, context)


def test_throughput_names_tokens_operations_peak_memory_and_time(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime
) -> None:
    throughput = trained(tiny_model(VOCAB, seed=0), runtime, SilentReporter(), 1000).throughput
    assert throughput is not None
    assert throughput.model_flops == STEPS * training_flops(tiny_model(VOCAB, seed=0), [6, 10, 4, 16], 18)
    assert throughput.utilisation == pytest.approx(throughput.flops_per_second / throughput.matmul_peak)
    assert set(throughput.seconds) == {"data", "forward", "backward", "optimizer", "logging"}
    assert throughput.micro_batch_tokens == 1000
    assert throughput.peak_memory_bytes > 2**20


def test_operations_of_a_known_shape(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Body: 6 a parameter and token; head: 6 a parameter and response token; scores: 6 · layers · heads · d · L²."""
    model = tiny_model(VOCAB, seed=0)
    body = sum(p.numel() for p in model.model.layers.parameters()) + 8
    assert training_flops(model, [5], 2) == 6 * body * 5 + 6 * VOCAB * 8 * 2 + 6 * 1 * 2 * 4 * 25


def test_out_of_memory_halves_the_micro_batches_and_ends_with_the_same_model(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, short = tiny_model(VOCAB, seed=0), tiny_model(VOCAB, seed=0)
    trained(plain, runtime, SilentReporter(), 1000)
    whole = loop.accumulate_gradients

    def with_little_memory(
        model: PreTrainedModel, data: StepData, objective: RowObjective, settings: StepSettings, **more: Any
    ) -> StepResult:
        result = whole(model, data, objective, settings, **more)
        if settings.micro_batch_tokens > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")  # after gradients were begun
        return result

    monkeypatch.setattr(loop, "accumulate_gradients", with_little_memory)
    reporter = ListeningReporter()
    summary = trained(short, runtime, reporter, 64)
    assert reporter.alerts == ["micro_batch_halved", "micro_batch_halved"]
    assert summary.throughput is not None
    assert summary.throughput.micro_batch_tokens == 16
    for a, b in zip(plain.parameters(), short.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_other_errors_are_not_taken_for_missing_memory(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(loop, "accumulate_gradients", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trained(tiny_model(VOCAB, seed=0), runtime, SilentReporter(), 64)
