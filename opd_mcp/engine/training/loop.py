"""The training loop shared by SFT, lightning and live distillation."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context, run_cancelled
from opd_mcp.engine.data.batches import StepData, StepsFrom
from opd_mcp.engine.losses.objectives import RowObjective
from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.nf4 import weight_count
from opd_mcp.engine.runtime import Runtime, hardware_name, is_out_of_memory, matmul_peak, peak_memory
from opd_mcp.engine.training.activations import (
    checkpointed_activations,
    model_shape,
    step_memory,
    step_size,
    whole_memory,
)
from opd_mcp.engine.training.checkpoints import Checkpoints, leave_moments, restore_moments
from opd_mcp.engine.training.held_out import HeldOut
from opd_mcp.engine.training.optim import NarrowAdamW, build_optimizer, learning_rate_at, set_rate
from opd_mcp.engine.training.rank_checkpoints import (
    RankCheckpoints,
    leave_whole_moments,
    replicas_before,
    restore_whole_moments,
)
from opd_mcp.engine.training.rank_step import accumulate_on_ranks
from opd_mcp.engine.training.ranks import Ranks, joined
from opd_mcp.engine.training.sharding import sharded
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
from opd_mcp.schemas.memory import POLICIES, Division, TrainingMemory, micro_tokens
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
class Stretch:
    """Steps `first` to `last` of a training that takes its steps in several processes of its own.

    The optimizer goes on from the file `begins_with` and is left in `leaves`, where they are given. `ended`, asked with
    the metrics of the last `watched` steps, ends the stretch early.
    """

    first: int
    last: int
    begins_with: Path | None = None
    leaves: Path | None = None
    ended: Callable[[Sequence[Metrics]], bool] = lambda recent: False
    watched: int = 0

    @property
    def told(self) -> int:
        """The last steps whose mean metrics are told: a tenth of them."""
        return max(1, (self.last - self.first) // 10)


@dataclass(frozen=True)
class TrainingTask:
    """What is trained on: the rows of each step, their loss, and the metrics of a step.

    `frozen` is the hash of what an adapter is trained on, which no checkpoint holds; `reweigh` gives the tokens of a
    step their factors; `stretch` says which of the steps are taken, where not all are; `held_out` judges the student
    between steps. `copy` is a whole student by which `steps` draws, where ranks divide the one that is trained.
    """

    settings: LoopSettings
    steps: StepsFrom
    objective: RowObjective
    measure: Callable[[StepResult], Metrics]
    frozen: str | None = None
    reweigh: Reweigh | None = None
    stretch: Stretch | None = None
    held_out: HeldOut | None = None
    copy: LoadedModel | None = None

    def judged(self, step: int) -> Metrics:
        """What the student is judged by after a step; mostly nothing."""
        return {} if self.held_out is None else self.held_out.metrics(step)

    def is_over(self, state: LoopState) -> bool:
        """Whether no further step is taken."""
        stopped = self.held_out is not None and self.held_out.stops()
        return stopped or state.step >= self.taken.last or self.taken.ended(state.recent)

    @property
    def taken(self) -> Stretch:
        """The steps that are taken."""
        return self.stretch or Stretch(0, self.settings.steps)


def train(model: PreTrainedModel, task: TrainingTask, runtime: Runtime, context: Context) -> TrainingSummary:
    """Take `settings.steps` optimizer steps, those of an earlier attempt's checkpoint included, and say what they did.

    Raises RunError `run_cancelled` between steps when asked to stop, after a checkpoint; `bad_number` when loss or
    gradient stay not finite. In the end the model holds its master weights.

    Of several ranks each calls this with the same task; in the end the first one's model is whole, in the host's
    memory, and the others' have no weights.
    """
    settings, stretch = task.settings, task.taken
    clock, guard = Stopwatch(runtime.device), FiniteGuard(context)
    process = (_OneProcess if context.ranks is None else _OneOfRanks)(model, task, runtime, context, clock)
    optimizer = build_optimizer(model, settings.optimizer, seed=runtime.seed, weights=process.weights())
    peak = matmul_peak(runtime.device, runtime.dtype) * process.size
    memory: TrainingMemory | None = None
    with ExitStack() as stack:
        checkpoints = stack.enter_context(process.checkpoints(optimizer))
        state = _state(process, optimizer, checkpoints)
        step = StepSettings(settings.normalize, state.micro_batch_tokens, runtime)
        steps = task.steps(state.step)
        while not process.is_over(state):
            if process.is_stopped():
                checkpoints.save(state, wait=True)
                raise run_cancelled()
            started = time.perf_counter()
            rate = learning_rate_at(state.step, settings.steps, settings.optimizer)
            set_rate(optimizer, rate)
            data = process.data(steps)
            if memory is None:
                memory = process.memory(data, state.micro_batch_tokens)
                stack.enter_context(checkpointed_activations(model, memory.policy))
            result, step = process.gradients(data, step)
            with clock.part("optimizer"):
                norm = process.clipped_norm()
            measured = task.measure(result)
            metrics = {"loss": result.loss, **measured, "gradient_norm": norm, "learning_rate": rate}
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
            with clock.part("evaluation" if task.held_out else "logging"):
                judged = process.judged(state.step + 1)
            with clock.part("logging"):
                context.reporter.metric(state.step + 1, metrics | judged)
                context.reporter.progress(state.step + 1, settings.steps, "steps")
            state = LoopState(
                step=state.step + 1,
                micro_batch_tokens=step.micro_batch_tokens,
                tokens=state.tokens + result.tokens,
                flops=state.flops + flops,
                seconds=state.seconds + time.perf_counter() - started,
                seconds_generation=state.seconds_generation + data.seconds_generation,
                seconds_scoring=state.seconds_scoring + data.seconds_scoring,
                parts=dict(Counter(state.parts) + Counter(clock.read())),
                recent=[*state.recent, metrics][-max(stretch.told, stretch.watched) :] if good else state.recent,
            )
            if good and state.step < stretch.last and checkpoints.is_due(state.step):
                with clock.part("checkpoint"):
                    checkpoints.save(state)
    _end(process, optimizer)
    return process.finished(_summary(model, task, state, memory, peak, runtime))


def _state(process: "_OneProcess", optimizer: torch.optim.Optimizer, checkpoints: Checkpoints) -> LoopState:
    """The state of an earlier attempt's checkpoint, else before the first step, with what a stretch before left."""
    task, state = process.task, checkpoints.restored()
    if state is None:
        if task.taken.begins_with is not None:
            process.restore_moments(optimizer, task.taken.begins_with)
        state = LoopState(step=task.taken.first, micro_batch_tokens=task.settings.micro_batch_tokens)
    if task.held_out is not None:
        task.held_out.begin(state.step)
    return state


def _end(process: "_OneProcess", optimizer: torch.optim.Optimizer) -> None:
    """Leave the optimizer's state to the next stretch, and the master weights in the model."""
    if (file := process.task.taken.leaves) is not None:
        process.leave_moments(optimizer, file)
    if isinstance(optimizer, NarrowAdamW):
        optimizer.restore_masters()


class _OneProcess:
    """What a training step needs of its process: here this one has the whole model."""

    size, replicas = 1, 1

    def __init__(
        self, model: PreTrainedModel, task: TrainingTask, runtime: Runtime, context: Context, clock: Stopwatch
    ) -> None:
        self.model, self.task, self.runtime, self.context, self.clock = model, task, runtime, context, clock
        self.vocabulary = context.runtime.vocabulary

    def weights(self) -> Iterable[nn.Parameter]:
        """What the optimizer moves, and frozen weights."""
        return self.model.parameters()

    def checkpoints(self, optimizer: torch.optim.Optimizer) -> Checkpoints:
        """The training's checkpoints."""
        return Checkpoints(self.model, optimizer, _fingerprint(self.model, self.task), self.context)

    def leave_moments(self, optimizer: torch.optim.Optimizer, file: Path) -> None:
        """Leave the optimizer's state to the next stretch."""
        leave_moments(optimizer, file)

    def restore_moments(self, optimizer: torch.optim.Optimizer, file: Path) -> None:
        """Go on with the optimizer's state of the stretch before."""
        restore_moments(optimizer, file)

    def is_over(self, state: LoopState) -> bool:
        """Whether no further step is taken."""
        return self.task.is_over(state)

    def is_stopped(self) -> bool:
        """Whether to stop before the next step."""
        return self.context.reporter.should_stop()

    def memory(self, data: StepData, micro_batch_tokens: int) -> TrainingMemory:
        """The estimate of a step like this one."""
        return self._memory(data, micro_batch_tokens, self.task.settings.activation_checkpointing)

    def gradients(self, data: StepData, settings: StepSettings) -> tuple[StepResult, StepSettings]:
        """The step's gradient and the settings it fitted in; out of memory, the step begins again with half the tokens.

        Normalisers are those of the whole step, so the gradient does not depend on the micro-batches.
        """
        model, task = self.model, self.task
        while True:
            try:
                result = accumulate_gradients(
                    model, data, task.objective, settings, reweigh=task.reweigh, clock=self.clock
                )
                return result, settings
            except RuntimeError as error:
                longest = int(data.sequences.lengths()[data.indices].max(initial=1))
                if not is_out_of_memory(error) or settings.micro_batch_tokens <= longest:
                    raise
            model.zero_grad(set_to_none=True)
            if settings.runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            settings = replace(settings, micro_batch_tokens=max(longest, settings.micro_batch_tokens // 2))
            self.context.reporter.alert(
                "micro_batch_halved",
                f"Memory ran out: micro-batches hold {settings.micro_batch_tokens} tokens from here on, the gradient "
                "is the same.",
            )

    def data(self, steps: Iterator[StepData]) -> StepData:
        """The rows of the next step."""
        return next(steps)

    def judged(self, step: int) -> Metrics:
        """What the student is judged by after a step; mostly nothing."""
        return self.task.judged(step)

    def clipped_norm(self) -> float:
        """The norm of the gradient before it was clipped."""
        limit = self.task.settings.optimizer.gradient_clip
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def finished(self, summary: TrainingSummary) -> TrainingSummary:
        """The summary, once the model is what is saved."""
        return summary

    def _memory(
        self, data: StepData, micro_batch_tokens: int, checkpointing: ActivationCheckpointing
    ) -> TrainingMemory:
        lengths = data.sequences.lengths()[data.indices]
        tokens = micro_tokens(micro_batch_tokens, int(lengths.max(initial=1)), int(lengths.sum()))
        precision = self.task.settings.optimizer.precision
        sharing = (self.size, self.vocabulary, self.replicas)
        return step_memory(self.model, precision, checkpointing, tokens=tokens, runtime=self.runtime, sharing=sharing)


class _OneOfRanks(_OneProcess):
    """The same where this process is one of several, which have divided the model."""

    def __init__(
        self, model: PreTrainedModel, task: TrainingTask, runtime: Runtime, context: Context, clock: Stopwatch
    ) -> None:
        super().__init__(model, task, runtime, context, clock)
        assert context.ranks is not None, "a rank has its place"
        self.size, ranks = context.ranks.size, joined(context.ranks, runtime.device)
        self.replicas = self._shared_replicas(ranks, context.ranks.nodes)
        self.parts = sharded(model, ranks.replicated(self.replicas), runtime)
        if runtime.device.type == "cuda":
            slower = "on several devices they are not compiled"
            context.reporter.alert("plain_layers", f"The decoder layers run in plain torch, more slowly: {slower}.")

    def weights(self) -> Iterable[nn.Parameter]:
        """This rank's parts."""
        return self.parts.trained().values()

    def checkpoints(self, optimizer: torch.optim.Optimizer) -> Checkpoints:
        """Those of all ranks together."""
        return RankCheckpoints(self.parts, optimizer, _fingerprint(self.model, self.task), self.context)

    def leave_moments(self, optimizer: torch.optim.Optimizer, file: Path) -> None:
        """The same; the first rank writes the whole state."""
        leave_whole_moments(self.parts, optimizer, file)

    def restore_moments(self, optimizer: torch.optim.Optimizer, file: Path) -> None:
        """The same; each rank reads its part."""
        restore_whole_moments(self.parts, optimizer, file)

    def is_over(self, state: LoopState) -> bool:
        """As the first rank finds."""
        return bool(self.parts.ranks.agreed(int(super().is_over(state)))[0])

    def is_stopped(self) -> bool:
        """As the first rank hears it."""
        return bool(self.parts.ranks.agreed(int(super().is_stopped()))[0])

    def memory(self, data: StepData, micro_batch_tokens: int) -> TrainingMemory:
        """Of one rank; how it computes is what the first rank's free memory allows."""
        memory = super().memory(data, micro_batch_tokens)
        policy, divided = self.parts.ranks.agreed(POLICIES.index(memory.policy), int(memory.divided))
        self.vocabulary = "divided" if divided else "gathered"
        self.parts = replace(self.parts, divides_steps=bool(divided))
        return self._memory(data, micro_batch_tokens, POLICIES[policy])

    def gradients(self, data: StepData, settings: StepSettings) -> tuple[StepResult, StepSettings]:
        """This rank's part of the gradient; memory that runs out on one rank ends the attempt of all."""
        task = self.task
        result = accumulate_on_ranks(self.parts, data, task.objective, settings, reweigh=task.reweigh, clock=self.clock)
        return result, settings

    def data(self, steps: Iterator[StepData]) -> StepData:
        """The same for all ranks; what draws them has the weights of now."""
        if self.task.copy is not None:
            self.parts.copy_trained(self.task.copy.model)
        return super().data(steps)

    def judged(self, step: int) -> Metrics:
        """The same by the first rank, with the weights of all; the others wait as long as it takes."""
        held_out, ranks, found = self.task.held_out, self.parts.ranks, Metrics()
        if held_out is not None and held_out.is_due(step):
            self.parts.copy_trained(held_out.student.model if ranks.rank == 0 else None)
            found = self.task.judged(step) if ranks.rank == 0 else found
            ranks.wait_for_first(f"judged/{step}")
        return found

    def clipped_norm(self) -> float:
        """That of the whole gradient."""
        return self.parts.clipped_norm(self.task.settings.optimizer.gradient_clip)

    def finished(self, summary: TrainingSummary) -> TrainingSummary:
        """The summary, once the first rank has the whole model."""
        self.parts.make_whole()
        told = None if self.vocabulary == "auto" else self.vocabulary  # no step was left to take
        replicas = self.replicas if self.replicas > 1 else None
        return summary.model_copy(update={"devices": self.size, "vocabulary": told, "replicas": replicas})

    def _shared_replicas(self, ranks: Ranks, nodes: int) -> int:
        """How many replicas the ranks hold, as the first one finds: by itself as many as before it resumed."""
        settings, device, wish = self.task.settings, self.runtime.device, self.context.runtime.replicas
        if wish == "auto" and nodes > 1:
            wish = replicas_before(self.context.checkpoints, self.size) or wish
        room = whole_memory(device) // (1 if device.type == "cuda" else self.size // nodes)
        precision, sharing = settings.optimizer.precision, (self.size, self.vocabulary, 1)
        step = step_size(self.model, precision, settings.micro_batch_tokens, self.runtime, sharing)
        division = Division(wish, nodes, room)
        found = division.replicas(model_shape(self.model), step, settings.activation_checkpointing)
        return ranks.agreed(found)[0]


def _summary(
    model: PreTrainedModel,
    task: TrainingTask,
    state: LoopState,
    memory: TrainingMemory | None,
    peak: float,
    runtime: Runtime,
) -> TrainingSummary:
    steps = state.step - task.taken.first
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parameters = weight_count(model)
    return TrainingSummary(
        steps=steps,
        seconds=state.seconds,
        seconds_per_step=state.seconds / steps,
        trained_tokens=state.tokens,
        parameters=parameters,
        trained_parameters=None if trained == parameters else trained,
        device=hardware_name(runtime.device),
        final=_means(state.recent[-task.taken.told :]),
        seconds_generation=state.seconds_generation or None,
        seconds_scoring=state.seconds_scoring or None,
        precision=task.settings.optimizer.precision,
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
    stretch = {} if task.stretch is None else {"stretch": [task.stretch.first, task.stretch.last]}
    return content_hash(parts | stretch | ({} if task.frozen is None else {"frozen": task.frozen}))


def _means(history: list[Metrics]) -> Metrics:
    return {name: float(np.mean([metrics[name] for metrics in history])) for name in history[-1]} if history else {}
