"""What saving checkpoints and logging cost a training: `python tools/bench/checkpoints.py [--logging] [--json FILE]`.

Trains one model of 33 million parameters on one core in turns of `--steps` steps, with and without a checkpoint, and
takes the median difference of paired turns. `share_at_default` is the cost of one checkpoint divided by the default
interval between checkpoints.

With `--logging` it trains the example's student, whose steps are short, as a run does: metrics and progress of every
step go to a journal on disk. `logging_share` is their share of one thread's CPU seconds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.checkpoints import COST_FACTOR, Checkpoints
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.optim import build_optimizer
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients, sft_metrics
from opd_mcp.schemas.recipes import CheckpointRecipe, OptimizerRecipe
from opd_mcp.schemas.reports import LoopState
from opd_mcp.store.journal import JournalWriter
from opd_mcp.worker.journal_reporter import JournalReporter
from tools import EXAMPLE

CONFIG = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Print the figures, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="steps per turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logging", action="store_true", help="measure logging instead of checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = logging_costs() if options.logging else checkpoint_costs(options.turns, options.steps)
    for name, value in found.items():
        print(f"{name:24} {value}")
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")


class TimedReporter(JournalReporter):
    """A run's reporter that adds up the CPU seconds of its step reports."""

    seconds = 0.0

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Report as a run does, timed."""
        started = time.thread_time()
        super().metric(step, values)
        self.seconds += time.thread_time() - started

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report as a run does, timed."""
        started = time.thread_time()
        super().progress(done, total, unit)
        self.seconds += time.thread_time() - started


def logging_costs(steps: int = 60) -> dict[str, float]:
    """CPU seconds per step of training the example's student, and of its logging."""
    runtime = Runtime(torch.device("cpu"), torch.float32, 0)
    model = load_model(EXAMPLE / "student", runtime, for_training=True).model
    rng = np.random.default_rng(0)
    prompts, responses = (rng.integers(2, 20, (64, size)).tolist() for size in (12, 24))
    data = StepData(build_sequences(prompts, responses), np.arange(64))
    settings = LoopSettings(steps, OptimizerRecipe(learning_rate=1e-4), "token", 16384)
    with tempfile.TemporaryDirectory() as folder, JournalWriter(Path(folder) / "journal.jsonl", 1) as journal:
        reporter = TimedReporter(journal, Path(folder))
        started = time.thread_time()
        train(
            model,
            TrainingTask(settings, lambda first: repeat(data), SFT_OBJECTIVE, sft_metrics),
            runtime,
            Context(reporter=reporter),
        )
        seconds = time.thread_time() - started
    return {
        "parameters": model.num_parameters(),
        "seconds_a_step": round(seconds / steps, 4),
        "logging_s_a_step": round(reporter.seconds / steps, 6),
        "logging_share": round(reporter.seconds / seconds, 5),
        "bar": 0.01,
    }


def checkpoint_costs(turns: int, steps_a_turn: int) -> dict[str, float]:
    """Seconds that a save pauses training, and what it costs over the default interval."""
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).train()
    optimizer = build_optimizer(model, OptimizerRecipe(learning_rate=1e-5), seed=0)
    runtime = Runtime(torch.device("cpu"), torch.float32, 0)
    batches = rows()

    def steps(count: int) -> None:
        for _ in range(count):
            step(model, optimizer, next(batches), runtime)

    with tempfile.TemporaryDirectory() as folder:
        context = Context(checkpoints=Path(folder), checkpoint=CheckpointRecipe(steps=1))
        with Checkpoints(model, optimizer, "bench", context) as checkpoints:
            steps(1)
            plain, saving, pauses = [], [], []
            for turn in range(turns):
                plain.append(
                    timed(lambda: [step(model, optimizer, next(batches), runtime) for _ in range(steps_a_turn)])
                )

                def with_checkpoint(number: int = turn) -> None:
                    pauses.append(timed(lambda: checkpoints.save(LoopState(step=number, micro_batch_tokens=1))))
                    for _ in range(steps_a_turn):
                        step(model, optimizer, next(batches), runtime)

                saving.append(timed(with_checkpoint))
                checkpoints.save(
                    LoopState(step=10_000 + turn, micro_batch_tokens=1), wait=True
                )  # finish before the next turn
    extra = statistics.median(with_ - without for with_, without in zip(saving, plain, strict=True))
    interval = max(CheckpointRecipe().seconds, COST_FACTOR * statistics.median(pauses))
    return {
        "parameters": model.num_parameters(),
        "checkpoint_mib": round(12 * model.num_parameters() / 2**20),
        "pause_s": round(statistics.median(pauses), 3),
        "extra_s_a_checkpoint": round(extra, 3),
        "default_interval_s": interval,
        "share_at_default": round(extra / interval, 4),
        "bar": 0.05,
    }


def rows() -> Iterator[StepData]:
    """Endless steps of the same kind: eight rows of 64 tokens."""
    rng = np.random.default_rng(0)
    while True:
        prompts, responses = (rng.integers(0, CONFIG["vocab_size"], (8, 32)).tolist() for _ in range(2))
        yield StepData(build_sequences(prompts, responses), np.arange(8))


def step(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, data: StepData, runtime: Runtime) -> None:
    """One optimizer step."""
    accumulate_gradients(model, data, SFT_OBJECTIVE, StepSettings("token", 4096, runtime))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of the work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
