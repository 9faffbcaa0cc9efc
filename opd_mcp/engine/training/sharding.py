"""A model whose weights are divided among ranks: decoder layers by FSDP2, vocabulary matrices by rows.

    decoder layers' matrices   DTensor rows, gathered layer by layer, gradients reduced and scattered as they come
    head                       DTensor rows, gathered once per step; one reduce-scatter of the main gradient at its end;
                               or never gathered (divided_vocabulary.py)
    untied embedding           DTensor rows; those of the step's tokens are gathered, and their gradients added up
    norms, biases, adapters    whole on every rank, their gradients added up once per step

Where the ranks hold several replicas, each replica is divided so; what is reduced within one is then added up over
them, the decoder layers' with the last micro-batch of a step.

Gradients are sums over the ranks, never means: a token's weight is already that of the whole step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from opd_mcp.engine.models.compiled import decoder_layers
from opd_mcp.engine.models.nf4 import packed_weights
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.ranks import Ranks, own_rows, rows_of
from opd_mcp.schemas.errors import ArgumentError


@dataclass(frozen=True)
class ShardedModel:
    """A model of which this rank holds a part; `vocabulary` is outside the model, by the names of its weights there.

    Outside a `window` the vocabulary's modules have weights without memory (on `meta`). With `divides_steps` steps
    need no window: their logits are computed where the rows are (divided_vocabulary.py).
    """

    model: PreTrainedModel
    ranks: Ranks
    vocabulary: dict[str, nn.Parameter]
    divides_steps: bool = False

    def weights(self) -> dict[str, nn.Parameter]:
        """This rank's part of every weight, by name and in the same order on every rank; a tied one is named once."""
        named = {name: self.vocabulary.get(name, weight) for name, weight in self.model.named_parameters()}
        return dict(sorted(named.items()))

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of them that are trained."""
        return {name: weight for name, weight in self.weights().items() if weight.requires_grad}

    def rows_of(self, module: nn.Module) -> nn.Parameter:
        """This rank's rows of the weight of an embedding or a head."""
        return next(rows for name, rows in self.vocabulary.items() if module in _modules_of(self.model, name))

    @contextmanager
    def window(self, tokens: NDArray[np.int64]) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, every rank has what a step needs of the vocabulary; at the end its gradients are sums over the ranks.

        It needs the whole head, and of an embedding that is another matrix the rows of these `tokens`, which are the
        same on all ranks. It yields the function that turns ids into rows of the embedding as it is inside.
        """
        modules = {name: _modules_of(self.model, name) for name in self.vocabulary}
        places = {name: found[0].weight for name, found in modules.items()}
        embedding = self.model.get_input_embeddings()
        padding = getattr(embedding, "padding_idx", None)
        ids = torch.from_numpy(np.unique(tokens)).to(self.ranks.device)
        some = next((name for name, found in modules.items() if found == [embedding]), None)
        lent = {
            name: self._whole(rows) if name != some else self._looked_up(rows, ids)
            for name, rows in self.vocabulary.items()
        }
        try:
            for name, found in modules.items():
                for module in found:
                    module.weight = lent[name]
            if some is None:
                yield lambda given: given
            else:
                if padding is not None:
                    row = (ids == padding).nonzero().flatten().tolist()
                    embedding.padding_idx = row[0] if row else None
                yield lambda given: torch.searchsorted(ids, given)
        finally:
            embedding.padding_idx = padding
            for name, found in modules.items():
                for module in found:
                    module.weight = places[name]
        # the looked-up rows last: by then the gathered weight and its gradient are gone
        for name, rows in sorted(self.vocabulary.items(), key=lambda item: item[0] == some):
            gradient = lent.pop(name).grad  # the weight itself is let go before room is needed for the sum
            if gradient is not None:
                rows.grad = self._summed(gradient, rows) if name != some else self._added_up(gradient, rows, ids)

    def add_up_layers(self, *, now: bool) -> None:
        """Whether the next backward adds up the layers' gradients over the replicas, with those of backwards before."""
        if self.ranks.replicas > 1:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_all_reduce(now, recurse=False)

    def add_up_rows(self) -> None:
        """Sum the gradients of the vocabulary's rows over the replicas, after a step without a window."""
        for rows in self.vocabulary.values():
            if rows.requires_grad:
                self.ranks.add_up_replicas(row_gradient(rows))

    def add_up_gradients(self) -> None:
        """Sum the gradients of what every rank holds whole; the others' are sums already."""
        held = [weight for weight in self.trained().values() if not isinstance(weight, DTensor)]
        gradients = [weight.grad for weight in held if weight.grad is not None]
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            same = [gradient for gradient in gradients if gradient.dtype is dtype]
            total = self.ranks.add_up(torch.cat([gradient.flatten() for gradient in same]))
            for gradient, part in zip(same, total.split([gradient.numel() for gradient in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def clipped_norm(self, limit: float) -> float:
        """The norm of the whole gradient, which is scaled down to `limit` where it is above."""
        square = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        gradients = [weight.grad for weight in self.trained().values() if weight.grad is not None]
        for gradient in gradients:
            if self.ranks.holds_first if isinstance(gradient, DTensor) else self.ranks.rank == 0:
                square += local(gradient).double().square().sum()
        norm = float(self.ranks.add_up(square).sqrt())
        scale = limit / (norm + 1e-6)
        if scale < 1.0:
            for gradient in gradients:
                local(gradient).mul_(scale)
        return norm

    @torch.no_grad()
    def copy_trained(self, copy: nn.Module | None) -> None:
        """Let a whole copy of the model have the weights that are trained; a rank without one only takes part."""
        held = {} if copy is None else dict(copy.named_parameters())
        for name, weight in self.trained().items():
            gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if copy is not None:
                held[name].copy_(gathered)

    def make_whole(self) -> None:
        """Give rank 0 the whole model, in the host's memory; the other ranks keep weights without memory."""
        for name, weight in self.weights().items():
            gathered = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
            kept = gathered.to("cpu" if self.ranks.rank == 0 else "meta")
            whole = nn.Parameter(kept, requires_grad=weight.requires_grad)
            for module, leaf in _owners(self.model, name):
                module.register_parameter(leaf, whole)
        if self.ranks.rank == 0:
            for module in self.model.modules():
                for leaf, buffer in module.named_buffers(recurse=False):
                    module._buffers[leaf] = buffer.cpu()

    def _whole(self, rows: nn.Parameter) -> nn.Parameter:
        mine, each = local(rows).detach(), rows_of(rows.shape[0], self.ranks.sharing)
        if len(mine) < each:
            mine = torch.cat([mine, mine.new_zeros(each - len(mine), *mine.shape[1:])])
        whole = self.ranks.gathered(mine)[: rows.shape[0]]
        return nn.Parameter(whole, requires_grad=rows.requires_grad)

    def _looked_up(self, rows: nn.Parameter, ids: Tensor) -> nn.Parameter:
        """The rows [n, H] of these ids, each from the rank that holds it; an adapter's base may be narrow."""
        own, here = self._own(rows, ids)
        found = own.new_zeros(len(ids), *own.shape[1:])
        found[here >= 0] = own[here[here >= 0]]
        return nn.Parameter(self.ranks.add_up_within(found), requires_grad=rows.requires_grad)

    def _added_up(self, gradient: Tensor, rows: nn.Parameter, ids: Tensor) -> DTensor:
        """This rank's rows of the sum of every rank's gradient [n, H] of these ids' rows."""
        own, here = self._own(rows, ids)
        mine = gradient.new_zeros(own.shape)
        mine[here[here >= 0]] = self.ranks.add_up_replicas(self.ranks.add_up_within(gradient)[here >= 0])
        return _rows(mine, rows.shape, self.ranks)

    def _own(self, rows: nn.Parameter, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows of a matrix, and where among them each id's is; -1 for those of other ranks."""
        held = own_rows(rows.shape[0], self.ranks.part, self.ranks.sharing)
        inside = (ids >= held.start) & (ids < held.stop)
        return local(rows).detach(), torch.where(inside, ids - held.start, -1)

    def _summed(self, gradient: Tensor, rows: nn.Parameter) -> Tensor:
        each, sharing = rows_of(rows.shape[0], self.ranks.sharing), self.ranks.sharing
        padded = gradient
        if len(gradient) < each * sharing:
            padded = gradient.new_zeros(each * sharing, *gradient.shape[1:])
            padded[: len(gradient)] = gradient
        mine = self.ranks.add_up_replicas(self.ranks.scattered_sum(padded))[: len(local(rows))]
        return _rows(mine, rows.shape, self.ranks)


def sharded(model: PreTrainedModel, ranks: Ranks, runtime: Runtime) -> ShardedModel:
    """The model divided among the ranks, each of which gives it whole; the parts move to the ranks' device.

    What is trained is float32 from then on, or wider. It is widened layer by layer, so that of a model that is mapped
    from its files a rank keeps its own parts alone.

    Raises ArgumentError `invalid_argument` for a model that cannot be divided.
    """
    layers, decoder = decoder_layers(model), model.get_decoder()
    if not layers or packed_weights(model):
        why = "holds weights in 4 bits" if layers else f"is of a class ({type(model).__name__}) without decoder layers"
        raise ArgumentError(
            "invalid_argument",
            f"The student {why}, which cannot be divided among devices.",
            value=f"runtime.devices={ranks.size}",
            fix="Set 'runtime.devices' to 1.",
        )
    vocabulary = _divided_vocabulary(model, ranks)
    narrow = runtime.trains_in_autocast and model.dtype is torch.float32
    policy = MixedPrecisionPolicy(
        # what autocast would make of float32 weights anyway, at half the traffic and without a copy of every weight
        param_dtype=torch.bfloat16 if narrow else None,
        reduce_dtype=torch.float32 if runtime.trains_in_autocast else None,
        cast_forward_inputs=False,
    )
    whole = {weight for name, weight in model.named_parameters() if weight.ndim < 2 or ".lora_" in name}
    whole |= {weight for weight in model.parameters() if weight.is_meta}
    for module in [*layers, decoder]:
        _widen(module)
        ignored = {weight for weight in module.parameters() if weight in whole or isinstance(weight, DTensor)}
        fully_shard(
            module,
            mesh=ranks.mesh,
            mp_policy=policy,
            reshard_after_forward=module is not decoder,
            ignored_params={weight for weight in ignored if not isinstance(weight, DTensor)} or None,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _widen(model)
    with torch.no_grad():
        for weight in model.parameters():
            if not isinstance(weight, DTensor) and not weight.is_meta:
                weight.data = weight.data.to(ranks.device)
        for module in model.modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                module._buffers[leaf] = buffer.to(ranks.device)
    return ShardedModel(model, ranks, vocabulary)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_gradient(rows: nn.Parameter) -> Tensor:
    """This rank's rows of the gradient of divided ones, float32 or wider, zeros at first."""
    if rows.grad is None:
        rows.grad = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    assert isinstance(rows.grad, DTensor), "rows of a divided weight have a divided gradient"
    return local(rows.grad)


def _divided_vocabulary(model: PreTrainedModel, ranks: Ranks) -> dict[str, nn.Parameter]:
    """This rank's rows of embedding and head by name; the modules are left with weights on `meta`."""
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    found: dict[str, nn.Parameter] = {}
    for name, weight in list(model.named_parameters()):  # a tied weight is named once
        if not any(weight is end for end in ends):
            continue
        own = weight.detach()[own_rows(len(weight), ranks.part, ranks.sharing)]
        rows = own.to(ranks.device, _held_dtype(weight), copy=True)
        found[name] = nn.Parameter(_rows(rows, weight.shape, ranks), requires_grad=weight.requires_grad)
        empty = torch.empty_like(weight, dtype=rows.dtype, device="meta")
        place = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for module, leaf in _owners(model, name):
            module.register_parameter(leaf, place)
    return found


def _held_dtype(weight: nn.Parameter) -> torch.dtype:
    """What a weight is kept in: a trained one in float32 or wider."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.requires_grad else weight.dtype


@torch.no_grad()
def _widen(module: nn.Module) -> None:
    """Give what the module still holds whole the dtype that it is kept in."""
    for weight in module.parameters():
        if not isinstance(weight, DTensor) and not weight.is_meta:
            weight.data = weight.data.to(_held_dtype(weight))


def _rows(mine: Tensor, shape: torch.Size, ranks: Ranks) -> DTensor:
    """The tensor of this shape of which `mine` are this rank's rows."""
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(0)] if ranks.replicas == 1 else [Replicate(), Shard(0)]
    return DTensor.from_local(mine, ranks.mesh, placements, run_check=False, shape=shape, stride=stride)


def _owners(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every module, with the name there, that holds the weight of this name."""
    weight = model.get_parameter(name)
    return [(module, leaf) for module in model.modules() for leaf, held in module._parameters.items() if held is weight]


def _modules_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for module, _ in _owners(model, name)]
