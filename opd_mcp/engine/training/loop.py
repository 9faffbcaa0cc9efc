"""The training loop shared by SFT, lightning and live distillation."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.rows import RowObjective
from opd_mcp.engine.runtime import Runtime, hardware_name
from opd_mcp.engine.training.optimizer import build_optimizer, learning_rate_at
from opd_mcp.engine.training.step import StepResult, accumulate_gradients
from opd_mcp.engine.training.stopwatch import Stopwatch
from opd_mcp.engine.training.throughput import is_out_of_memory, matmul_peak, peak_memory, training_flops
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import Normalize, OptimizerRecipe
from opd_mcp.schemas.reports import Throughput, TrainingSummary

Metrics = dict[str, float]


@dataclass(frozen=True)
class StepData:
    """The rows of one optimizer step, with the seconds it took to generate and to score them (0 from a cache)."""

    sequences: Sequences
    indices: NDArray[np.int64]
    seconds_generation: float = 0.0
    seconds_scoring: float = 0.0


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a stage's recipe."""

    steps: int
    optimizer: OptimizerRecipe
    normalize: Normalize
    micro_batch_tokens: int


def train(
    model: PreTrainedModel,
    settings: LoopSettings,
    batches: Iterator[StepData],
    objective: RowObjective,
    measure: Callable[[StepResult], Metrics],
    runtime: Runtime,
    context: Context,
) -> TrainingSummary:
    """Take `settings.steps` optimizer steps and return what they did.

    Raises RunError `run_cancelled` between steps when asked to stop, `bad_number` for a loss or gradient that is not
    finite.
    """
    optimizer = build_optimizer(model, settings.optimizer)
    history: list[Metrics] = []
    tokens, generation, scoring, flops = 0, 0.0, 0.0, 0.0
    clock, parts, budget = Stopwatch(runtime.device), Counter[str](), settings.micro_batch_tokens
    peak = matmul_peak(runtime.device, runtime.dtype)
    started = time.perf_counter()
    for step in range(settings.steps):
        require_going(context)
        rate = learning_rate_at(step, settings.steps, settings.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_started = time.perf_counter()
        data = next(batches)
        result, budget = _gradients(model, data, objective, settings, budget, runtime, clock, context)
        with clock.part("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clip)
        metrics = {"loss": result.loss, **measure(result), "gradient_norm": float(norm), "learning_rate": rate}
        _require_finite(step, metrics)
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - step_started
        step_flops = training_flops(model, result.lengths, result.tokens)
        metrics["tokens_per_second"] = result.tokens / seconds
        metrics["utilisation"] = step_flops / seconds / peak
        tokens += result.tokens
        flops += step_flops
        generation += data.seconds_generation
        scoring += data.seconds_scoring
        history.append(metrics)
        with clock.part("logging"):
            context.reporter.metric(step + 1, metrics)
            context.reporter.progress(step + 1, settings.steps, "steps")
        parts.update(clock.read())
    seconds = time.perf_counter() - started
    return TrainingSummary(
        steps=settings.steps,
        seconds=seconds,
        seconds_per_step=seconds / settings.steps,
        trained_tokens=tokens,
        parameters=model.num_parameters(),
        device=hardware_name(runtime.device),
        final=_means(history[-max(1, settings.steps // 10) :]),
        seconds_generation=generation or None,
        seconds_scoring=scoring or None,
        throughput=Throughput(
            tokens_per_second=tokens / seconds,
            model_flops=flops,
            flops_per_second=flops / seconds,
            utilisation=flops / seconds / peak,
            matmul_peak=peak,
            peak_memory_bytes=peak_memory(runtime.device),
            micro_batch_tokens=budget,
            seconds=dict(parts),
        ),
    )


def _gradients(
    model: PreTrainedModel,
    data: StepData,
    objective: RowObjective,
    settings: LoopSettings,
    budget: int,
    runtime: Runtime,
    clock: Stopwatch,
    context: Context,
) -> tuple[StepResult, int]:
    """The step's gradient and the micro-batch budget it fitted in; out of memory, the step begins anew with half of it.

    Normalisers are those of the whole step, so the gradient is the same whatever the budget.
    """
    while True:
        try:
            result = accumulate_gradients(
                model,
                data.sequences,
                data.indices,
                objective,
                normalize=settings.normalize,
                micro_batch_tokens=budget,
                runtime=runtime,
                clock=clock,
            )
        except RuntimeError as error:
            longest = int(data.sequences.lengths()[data.indices].max(initial=1))
            if not is_out_of_memory(error) or budget <= longest:
                raise
        else:
            return result, budget
        model.zero_grad(set_to_none=True)
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        budget = max(longest, budget // 2)
        context.reporter.alert(
            "micro_batch_halved",
            f"Memory ran out: micro-batches hold {budget} tokens from here on, the gradient is the same.",
        )


def require_going(context: Context) -> None:
    """Raise RunError `run_cancelled` if the user asked to stop."""
    if context.reporter.should_stop():
        raise RunError("run_cancelled", "The run was cancelled on request.", fix="Start it again when wanted.")


def _require_finite(step: int, metrics: Metrics) -> None:
    bad = {name: value for name, value in metrics.items() if not np.isfinite(value)}
    if bad:
        raise RunError(
            "bad_number",
            f"Step {step + 1} produced numbers that are not finite; the weights were not changed by it.",
            value=bad,
            fix="Lower the learning rate of this stage, or look at the data of this step.",
        )


def _means(history: list[Metrics]) -> Metrics:
    return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[-1]}
