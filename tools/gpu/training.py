"""Every precision trains on one device, and a stopped training resumes: a part of `check.py`."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.data.batches import stored_batches
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import sft_metrics
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import CheckpointRecipe, OptimizerRecipe, Precision
from tools.gpu.timing import Check

PRECISIONS: tuple[Precision, ...] = ("fp32_master", "split_master", "bf16_stochastic")
STEPS, STOPPED_AFTER, VOCAB = 24, 13, 512
# ‖resumed − whole‖ / ‖whole − start‖; on CUDA the order of sums in attention's backward varies
MOST_APART = 0.05
# the last loss as a share of the first
MOST_LOSS = 0.8


class Recorder(SilentReporter):
    """Keeps the losses, and asks to stop after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.losses: dict[int, float] = {}

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the step's loss."""
        self.losses[step] = values["loss"]

    def should_stop(self) -> bool:
        """Whether `stop_after` steps are done."""
        return self.stop_after is not None and len(self.losses) >= self.stop_after


def training_checks(make_model: Callable[[], PreTrainedModel], runtime: Runtime, check: Check) -> dict[str, object]:
    """For each precision, how far the loss falls and how far a resumed training ends from an uninterrupted one.

    `make_model` returns the same float32 model each time, in training mode, with a vocabulary of VOCAB.
    """
    found: dict[str, object] = {}
    for precision in PRECISIONS:
        start = parameters(make_model())
        with tempfile.TemporaryDirectory() as folder:
            whole, losses = trained(make_model(), precision, runtime, Recorder(), Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            stopping = Recorder(STOPPED_AFTER)
            with suppress(RunError):
                trained(make_model(), precision, runtime, stopping, Path(folder))
            resumed, rest = trained(make_model(), precision, runtime, Recorder(), Path(folder))
            assert (max(stopping.losses), min(rest)) == (STOPPED_AFTER, STOPPED_AFTER + 1), (
                "it resumes where it stopped"
            )
        apart = ((resumed - whole).norm() / (whole - start).norm()).item()
        found[precision] = {
            "loss": check(f"training {precision}, last loss / first", losses[STEPS] / losses[1], MOST_LOSS),
            "apart": check(f"training {precision}, resumed against whole", apart, MOST_APART),
        }
    return found


def trained(
    model: PreTrainedModel, precision: Precision, runtime: Runtime, reporter: Recorder, folder: Path
) -> tuple[Tensor, dict[int, float]]:
    """The parameters after STEPS steps of SFT, and the losses; resumes from checkpoints in `folder`."""
    rows = random_rows()
    optimizer = OptimizerRecipe(learning_rate=3e-3, precision=precision)
    context = Context(reporter=reporter, checkpoints=folder, checkpoint=CheckpointRecipe(steps=5))
    batches = stored_batches(rows, steps=STEPS, batch_size=8, seed=runtime.seed, scope="training")
    settings = LoopSettings(STEPS, optimizer, "token", 400)
    train(model, TrainingTask(settings, batches, SFT_OBJECTIVE, sft_metrics), runtime, context)
    return parameters(model), reporter.losses


def random_rows() -> Sequences:
    """32 short prompts with responses of few distinct tokens, which are quickly learned."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(VOCAB, size=8).tolist() for _ in range(32)]
    return build_sequences(prompts, [rng.integers(8, size=length).tolist() for length in rng.integers(20, 90, 32)])


def parameters(model: PreTrainedModel) -> Tensor:
    """All parameters as one float32 vector [P]."""
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
