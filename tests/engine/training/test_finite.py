"""Numbers that are not finite never reach the weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.losses.objectives import distill_objective
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.checkpoints import saved_checkpoints
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import distill_metrics
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import DistillRecipe, OptimizerRecipe, Precision

VOCAB = 13
RECIPE = DistillRecipe()


class Alerts(SilentReporter):
    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def alert(self, code: str, message: str) -> None:
        self.found.append((code, message))


@pytest.fixture
def trained(tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, tmp_path: Path):
    """`trained(bad)`: the model after six steps whose teacher log-probs are NaN at the given steps, and its alerts."""

    def run(
        bad: set[int], reporter: SilentReporter, precision: Precision = "fp32_master", **sizes: int
    ) -> PreTrainedModel:
        model = tiny_model(VOCAB, seed=0, dtype=torch.float32, **sizes).train()
        rng = np.random.default_rng(0)

        def steps(first: int) -> Iterator[StepData]:
            for step in range(first, 6):
                prompts, responses = ([rng.integers(2, VOCAB, size=n).tolist() for n in (3, 5)] for _ in range(2))
                rows = build_sequences(prompts, responses)
                scores = np.full(len(rows.response_ids), np.nan if step in bad else -1.0, dtype=np.float32)
                yield StepData(rows.with_columns(teacher_logprobs=scores), np.arange(2))

        optimizer = OptimizerRecipe(learning_rate=1e-2, precision=precision)
        settings = LoopSettings(6, optimizer, "token", 1000)
        context = Context(reporter=reporter, checkpoints=tmp_path)
        measure = lambda result: distill_metrics(result, RECIPE)  # noqa: E731
        train(model, TrainingTask(settings, steps, distill_objective(RECIPE), measure), runtime, context)
        return model

    return run


def test_three_bad_steps_in_a_row_are_skipped_and_training_goes_on(trained) -> None:
    reporter = Alerts()
    model = trained({1, 2, 3}, reporter)
    assert [code for code, _ in reporter.found] == ["step_skipped"] * 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.needs("torchao")
def test_8_bit_moments_never_see_a_bad_step(trained) -> None:
    """Blocks share a scale, so one bad gradient would reach 256 values."""
    reporter = Alerts()
    model = trained({1, 2, 3}, reporter, "fp32_master_8bit", hidden_size=64, intermediate_size=64)
    assert [code for code, _ in reporter.found] == ["step_skipped"] * 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_bad_steps_that_are_not_in_a_row_never_end_it(trained) -> None:
    reporter = Alerts()
    trained({0, 2, 4, 5}, reporter)
    assert len(reporter.found) == 4


def test_a_fourth_in_a_row_ends_it_with_a_checkpoint_and_the_rows(trained, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="bad_number") as caught:
        trained({2, 3, 4, 5}, Alerts())
    assert "Steps 3 to 6" in caught.value.message
    assert "nan" in str(caught.value.value)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step-00000002"]
    rows = [json.loads(line) for line in (tmp_path / "bad-step-00000006.jsonl").read_text().splitlines()]
    assert [row["finite"] for row in rows] == [False, False]
    assert len(rows[0]["teacher_logprobs"]) == len(rows[0]["response_ids"])
