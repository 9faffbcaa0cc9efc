"""The training loop shared by SFT, lightning and live distillation."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, run_cancelled
from opd_mcp.engine.data.batches import StepData, StepsFrom
from opd_mcp.engine.losses.objectives import RowObjective
from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.nf4 import weight_count
from opd_mcp.engine.runtime import Runtime, hardware_name, is_out_of_memory, matmul_peak, peak_memory
from opd_mcp.engine.training.activations import checkpointed_activations, step_memory
from opd_mcp.engine.training.checkpoints import Checkpoints
from opd_mcp.engine.training.optim import NarrowAdamW, build_optimizer, learning_rate_at
from opd_mcp.engine.training.step import (
    Metrics,
    Reweigh,
    StepResult,
    StepSettings,
    Stopwatch,
    accumulate_gradients,
    training_flops,
)
from opd_mcp.engine.training.watches import FiniteGuard
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.memory import TrainingMemory, micro_tokens
from opd_mcp.schemas.recipes import ActivationCheckpointing, DistillRecipe, Normalize, OptimizerRecipe, SftRecipe
from opd_mcp.schemas.reports import LoopState, Throughput, TrainingSummary


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a stage's settings."""

    steps: int
    optimizer: OptimizerRecipe
    normalize: Normalize
    micro_batch_tokens: int
    activation_checkpointing: ActivationCheckpointing = "auto"

    @classmethod
    def of(cls, section: SftRecipe | DistillRecipe, normalize: Normalize) -> "LoopSettings":
        """Those of a recipe's section."""
        return cls(
            section.steps, section.optimizer, normalize, section.micro_batch_tokens, section.activation_checkpointing
        )


@dataclass(frozen=True)
class TrainingTask:
    """What is trained on: the rows of each step, their loss, and the metrics of a step.

    `frozen` is the hash of what an adapter is trained on, which no checkpoint holds; `reweigh` gives the tokens of a
    step their factors.
    """

    settings: LoopSettings
    steps: StepsFrom
    objective: RowObjective
    measure: Callable[[StepResult], Metrics]
    frozen: str | None = None
    reweigh: Reweigh | None = None


def train(model: PreTrainedModel, task: TrainingTask, runtime: Runtime, context: Context) -> TrainingSummary:
    """Take `settings.steps` optimizer steps, those of an earlier attempt's checkpoint included, and say what they did.

    Raises RunError `run_cancelled` between steps when asked to stop, after a checkpoint; `bad_number` when loss or
    gradient stay not finite. In the end the model holds its master weights.
    """
    settings = task.settings
    optimizer = build_optimizer(model, settings.optimizer, seed=runtime.seed)
    clock, guard = Stopwatch(runtime.device), FiniteGuard(context)
    peak = matmul_peak(runtime.device, runtime.dtype)
    memory: TrainingMemory | None = None
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(model, optimizer, _fingerprint(model, task), context))
        state = checkpoints.restored() or LoopState(micro_batch_tokens=settings.micro_batch_tokens)
        step = StepSettings(settings.normalize, state.micro_batch_tokens, runtime)
        steps = task.steps(state.step)
        while state.step < settings.steps:
            if context.reporter.should_stop():
                checkpoints.save(state, wait=True)
                raise run_cancelled()
            started = time.perf_counter()
            rate = learning_rate_at(state.step, settings.steps, settings.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
            data = next(steps)
            if memory is None:
                memory = _memory(model, settings, data, state.micro_batch_tokens, runtime)
                stack.enter_context(checkpointed_activations(model, memory.policy))
            result, step = _gradients(model, data, task, step, clock, context)
            with clock.part("optimizer"):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clip)
            measured = task.measure(result)
            metrics = {"loss": result.loss, **measured, "gradient_norm": float(norm), "learning_rate": rate}
            try:
                good = guard.is_good(state.step, metrics, data.sequences)
            except RunError:
                checkpoints.save(guard.last_good(state), wait=True)
                raise
            with clock.part("optimizer"):
                if good:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            flops = training_flops(model, result.lengths, result.tokens)
            metrics |= {"tokens_per_second": result.tokens / seconds, "utilisation": flops / seconds / peak}
            with clock.part("logging"):
                context.reporter.metric(state.step + 1, metrics)
                context.reporter.progress(state.step + 1, settings.steps, "steps")
            kept = max(1, settings.steps // 10)
            state = LoopState(
                step=state.step + 1,
                micro_batch_tokens=step.micro_batch_tokens,
                tokens=state.tokens + result.tokens,
                flops=state.flops + flops,
                seconds=state.seconds + time.perf_counter() - started,
                seconds_generation=state.seconds_generation + data.seconds_generation,
                seconds_scoring=state.seconds_scoring + data.seconds_scoring,
                parts=dict(Counter(state.parts) + Counter(clock.read())),
                recent=[*state.recent, metrics][-kept:] if good else state.recent,
            )
            if good and state.step < settings.steps and checkpoints.is_due(state.step):
                with clock.part("checkpoint"):
                    checkpoints.save(state)
    if isinstance(optimizer, NarrowAdamW):
        optimizer.restore_masters()
    return _summary(model, settings, state, memory, peak, runtime)


def _memory(
    model: PreTrainedModel, settings: LoopSettings, data: StepData, micro_batch_tokens: int, runtime: Runtime
) -> TrainingMemory:
    """The estimate of a step like this one."""
    lengths = data.sequences.lengths()[data.indices]
    tokens = micro_tokens(micro_batch_tokens, int(lengths.max(initial=1)), int(lengths.sum()))
    precision, checkpointing = settings.optimizer.precision, settings.activation_checkpointing
    return step_memory(model, precision, checkpointing, tokens=tokens, runtime=runtime)


def _summary(
    model: PreTrainedModel,
    settings: LoopSettings,
    state: LoopState,
    memory: TrainingMemory | None,
    peak: float,
    runtime: Runtime,
) -> TrainingSummary:
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parameters = weight_count(model)
    return TrainingSummary(
        steps=settings.steps,
        seconds=state.seconds,
        seconds_per_step=state.seconds / settings.steps,
        trained_tokens=state.tokens,
        parameters=parameters,
        trained_parameters=None if trained == parameters else trained,
        device=hardware_name(runtime.device),
        final=_means(state.recent),
        seconds_generation=state.seconds_generation or None,
        seconds_scoring=state.seconds_scoring or None,
        precision=settings.optimizer.precision,
        activation_checkpointing=memory.policy if memory else None,
        packed=packs(model),
        throughput=Throughput(
            tokens_per_second=state.tokens / state.seconds,
            model_flops=state.flops,
            flops_per_second=state.flops / state.seconds,
            utilisation=state.flops / state.seconds / peak,
            matmul_peak=peak,
            peak_memory_bytes=peak_memory(runtime.device),
            estimated_memory_bytes=memory.total if memory else None,
            micro_batch_tokens=state.micro_batch_tokens,
            seconds=state.parts,
        ),
    )


def _fingerprint(model: PreTrainedModel, task: TrainingTask) -> str:
    """What a checkpoint must have been written for, so that a training can continue from it."""
    shapes = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in model.named_parameters()]
    recipe = {**asdict(task.settings), "optimizer": task.settings.optimizer.to_dict()}
    parts = {"settings": recipe, "objective": repr(task.objective), "parameters": shapes}
    return content_hash(parts | ({} if task.frozen is None else {"frozen": task.frozen}))


def _gradients(
    model: PreTrainedModel,
    data: StepData,
    task: TrainingTask,
    settings: StepSettings,
    clock: Stopwatch,
    context: Context,
) -> tuple[StepResult, StepSettings]:
    """The step's gradient and the settings it fitted in; out of memory, the step begins again with half the tokens.

    Normalisers are those of the whole step, so the gradient does not depend on the micro-batches.
    """
    while True:
        try:
            result = accumulate_gradients(model, data, task.objective, settings, reweigh=task.reweigh, clock=clock)
            return result, settings
        except RuntimeError as error:
            longest = int(data.sequences.lengths()[data.indices].max(initial=1))
            if not is_out_of_memory(error) or settings.micro_batch_tokens <= longest:
                raise
        model.zero_grad(set_to_none=True)
        if settings.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        settings = replace(settings, micro_batch_tokens=max(longest, settings.micro_batch_tokens // 2))
        context.reporter.alert(
            "micro_batch_halved",
            f"Memory ran out: micro-batches hold {settings.micro_batch_tokens} tokens from here on, the gradient is "
            "the same.",
        )


def _means(history: list[Metrics]) -> Metrics:
    return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[-1]} if history else {}
