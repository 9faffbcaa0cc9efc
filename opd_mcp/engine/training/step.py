"""One optimizer step over micro-batches: its gradient, which does not depend on how it is cut, and its metrics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import Batch, Group, StepData, build_batch, grouped_rows
from opd_mcp.engine.losses.linear_head import HeadLosses, LossRows, one_pass_losses, row_scores
from opd_mcp.engine.losses.objectives import RowObjective, clipped_advantage, target_scores, token_weights
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.models.nf4 import weight_count
from opd_mcp.engine.runtime import Runtime
from opd_mcp.schemas.recipes import DistillRecipe, Normalize

Metrics = dict[str, float]


class Stopwatch:
    """Seconds of each named part since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside towards the part."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """The parts' seconds since the last reading; waits for the device on CUDA."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed: its normaliser, the tokens of a micro-batch, device and dtype."""

    normalize: Normalize
    micro_batch_tokens: int
    runtime: Runtime


@dataclass(frozen=True)
class StepTokens:
    """Per-token values of a whole step: log π_θ [R], the sequence of each token [R], and the stored columns."""

    logprobs: Tensor
    sequence: Tensor
    columns: dict[str, Tensor]


# the factors [R] by which a sequence- or batch-scoped objective weighs the tokens of a step
Reweigh = Callable[[StepTokens], Tensor]
# the losses of hidden states [R, H] and their rows, whose gradients are formed or on their way
LossesOf = Callable[[Tensor, LossRows], HeadLosses]


@dataclass(frozen=True)
class StepResult:
    """What a step computed before the optimizer moved: the loss, and per-token values in data order of the step.

    `tokens` are response tokens, `lengths` those of all sequences, prompts included.
    """

    loss: float
    logprobs: Tensor
    columns: dict[str, Tensor]
    tokens: int
    lengths: tuple[int, ...] = ()


def accumulate_gradients(
    model: PreTrainedModel,
    data: StepData,
    objective: RowObjective,
    settings: StepSettings,
    *,
    reweigh: Reweigh | None = None,
    clock: Stopwatch | None = None,
) -> StepResult:
    """Add the gradient of the weighted loss over the step's rows to the parameters' gradients.

    Normalisers are taken over the whole step first, so micro-batches only decide memory. With `reweigh` a first pass
    over all log-probs gives each token a factor, held constant: that is how sequence- and batch-scoped weights work.
    """
    clock = clock or Stopwatch(settings.runtime.device)
    factors = None if reweigh is None else _first_pass(model, data, reweigh, settings)
    batches = _weighted(_micro_batches(model, data, settings, clock), row_weights(data, settings), factors)
    added = added_gradients(model, batches, head_losses(model, objective, settings.runtime), settings, clock)
    if not added.logprobs:
        return StepResult(0.0, torch.empty(0), {}, 0)
    joined = torch.cat(added.logprobs)
    names = added.batches[0].columns
    stored = {name: torch.cat([batch.columns[name] for batch in added.batches]) for name in names}
    lengths = tuple(length for batch in added.batches for length in batch.lengths)
    return StepResult(float(added.total), joined, stored, len(joined), lengths)


@dataclass(frozen=True)
class AddedGradients:
    """What micro-batches gave: the sum of their losses, each one's log-probs, and they themselves."""

    total: Tensor
    logprobs: list[Tensor]
    batches: list[Batch]


def head_losses(model: PreTrainedModel, objective: RowObjective, runtime: Runtime) -> LossesOf:
    """The losses by the head that the model has, whose gradient, and the embedding's, are zeros at first."""
    head = model_head(model, runtime.dtype if runtime.trains_in_autocast else None)
    head_grad = main_gradient(head.weight)
    main_gradient(model.get_input_embeddings().weight)
    return lambda hidden, rows: one_pass_losses(head, hidden, rows, objective, main_grad=head_grad)


def added_gradients(
    model: PreTrainedModel,
    batches: Iterable[tuple[Batch, Tensor]],
    losses_of: LossesOf,
    settings: StepSettings,
    clock: Stopwatch,
) -> AddedGradients:
    """Add the gradients of these micro-batches, each with the weights [R] of its tokens, to the parameters' own."""
    runtime = settings.runtime
    added = AddedGradients(torch.zeros((), dtype=torch.float64, device=runtime.device), [], [])
    for batch, weights in batches:
        with clock.part("forward"):
            embedding_grad = main_gradient(model.get_input_embeddings().weight)
            with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
                hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows, main_grad=embedding_grad)
            rows = LossRows(batch.targets, weights.to(runtime.device), batch.columns)
            losses = losses_of(hidden, rows)
        with clock.part("backward"):
            torch.autograd.backward(losses.total)
        added.total.add_(losses.total.detach())
        added.logprobs.append(losses.logprobs)
        added.batches.append(batch)
    return added


def row_weights(data: StepData, settings: StepSettings) -> Tensor:
    """The weight [rows of the data], float64, of each token of a row; the step's normaliser is in it."""
    counts, indices = torch.from_numpy(data.sequences.response_lengths()), torch.from_numpy(data.indices)
    weights = torch.zeros(len(data.sequences), dtype=torch.float64)
    weights[indices] = token_weights(counts[indices], settings.normalize)
    return weights if data.row_weights is None else weights * torch.from_numpy(data.row_weights)


def token_weights_of(batch: Batch, weights: Tensor) -> Tensor:
    """The weights [R] of a micro-batch's tokens, of those of all rows."""
    return weights[torch.from_numpy(batch.indices)].to(batch.sequence.device)[batch.sequence]


def _weighted(batches: Iterable[Batch], weights: Tensor, factors: Tensor | None) -> Iterator[tuple[Batch, Tensor]]:
    """The micro-batches with the weights of their tokens; `factors` [R] are in the order of the step's tokens."""
    first = 0
    for batch in batches:
        own = token_weights_of(batch, weights)
        if factors is not None:
            own = own * factors[first : first + len(batch.rows)]
            first += len(batch.rows)
        yield batch, own


def main_gradient(weight: Tensor) -> Tensor | None:
    """The weight's `.grad`, float32 or wider, zeros at first; None for a frozen weight.

    Narrower weights were given a float32 gradient by the optimizer (optim.py), so that autograd sums in it as well.
    """
    if not weight.requires_grad:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return weight.grad


def _micro_batches(model: PreTrainedModel, data: StepData, settings: StepSettings, clock: Stopwatch) -> Iterator[Batch]:
    with clock.part("data"):
        groups = trained_groups(model, data, settings)
    for group in groups:
        with clock.part("data"):
            batch = build_batch(data.sequences, group, settings.runtime.device)
        yield batch


def trained_groups(model: PreTrainedModel, data: StepData, settings: StepSettings) -> list[Group]:
    """The rows of the step's micro-batches, without those that have no response token."""
    sequences, counts = data.sequences, data.sequences.response_lengths()
    groups = grouped_rows(sequences.lengths(), data.indices, settings.micro_batch_tokens, packed=packs(model))
    return [group for group in groups if counts[group].sum() > 0]


@torch.no_grad()
def _first_pass(model: PreTrainedModel, data: StepData, reweigh: Reweigh, settings: StepSettings) -> Tensor:
    """The factors [R] in the order of the step's micro-batches."""
    runtime = settings.runtime
    head = model_head(model, runtime.dtype if runtime.trains_in_autocast else None)
    logprobs, rows, columns = [], [], []
    for batch in _micro_batches(model, data, settings, Stopwatch(runtime.device)):
        with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.trains_in_autocast):
            hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
        logprobs.append(row_scores(head, hidden, batch.targets).logprobs)
        rows.append(torch.from_numpy(batch.indices).to(runtime.device)[batch.sequence])
        columns.append(batch.columns)
    if not logprobs:
        return torch.empty(0)
    stored = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    return reweigh(StepTokens(torch.cat(logprobs), torch.cat(rows), stored)).detach()


def training_flops(model: PreTrainedModel, lengths: Sequence[int], response_tokens: int) -> float:
    """Operations that one step needs, forward and backward; recomputation is not counted.

    Six per parameter and token of the body, six per head parameter and response token, and causal attention's scores;
    four where the parameter is frozen, whose own gradient is not formed. Of a mixture of experts all experts are
    counted: an upper bound.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    table = model.get_input_embeddings().weight
    body = weight_count(model) - table.numel()
    frozen = weight_count(model) - sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    head_operations = 6 if model.get_output_embeddings().weight.requires_grad else 4
    if frozen:
        frozen -= table.numel()
    if model.get_output_embeddings().weight is not table:
        body -= head
        frozen -= head if frozen else 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 6 * config.num_hidden_layers * config.num_attention_heads * width * sum(n * n for n in lengths)
    body_operations = 6 * body - 2 * frozen
    return float(body_operations * sum(lengths) + head_operations * head * response_tokens + scores)


def sft_metrics(result: StepResult) -> Metrics:
    """Mean token log-prob of the teacher's responses."""
    return {"mean_logprob": float(result.logprobs.mean())} if result.tokens else {}


def distill_metrics(result: StepResult, settings: DistillRecipe) -> Metrics:
    """Reverse KL on the rollouts' tokens (k1, k3), advantage, drift from the behaviour policy.

    On live rollouts, and in the first step on cached ones, k1 and k3 estimate KL(π_θ‖π_T); later cached steps measure
    them on the behaviour policy's tokens. Definitions: docs/method.md.
    """
    if not result.tokens:
        return {}
    student = result.logprobs.double()
    teacher = result.columns["teacher_logprobs"].double()
    difference = teacher - student
    target = target_scores(result.columns, settings.extrapolation).double()
    advantage = clipped_advantage(student, target, settings.advantage_clip)
    metrics = {
        "reverse_kl_k1": float(-difference.mean()),
        "reverse_kl_k3": float((difference.clamp(max=20).exp() - difference - 1).mean()),
        "advantage_mean": float(advantage.mean()),
        "advantage_abs": float(advantage.abs().mean()),
        "advantage_clipped": float(((target - student).abs() > settings.advantage_clip).double().mean()),
    }
    if result.lengths:
        metrics["mean_response_tokens"] = result.tokens / len(result.lengths)
    if "behaviour_logprobs" in result.columns:  # a converted cache has none
        ratio = (student - result.columns["behaviour_logprobs"].double()).clamp(-20, 20).exp()
        share = ratio.sum().square() / (len(ratio) * ratio.square().sum()).clamp_min(1e-300)
        metrics |= {"drift_mean": float(ratio.mean()), "effective_sample_share": float(share)}
    return metrics


def domain_metrics(result: StepResult, names: Sequence[str]) -> Metrics:
    """k1 of the reverse KL on the tokens of each domain that the step has, as `reverse_kl_k1_NAME`."""
    if not names or not result.tokens:
        return {}
    difference = (result.logprobs - result.columns["teacher_logprobs"]).double()
    places, metrics = result.columns["domain"], {}
    for place, name in enumerate(names):
        own = difference[places == place]
        if len(own):
            metrics[f"reverse_kl_k1_{name}"] = float(own.mean())
    return metrics
