"""AdamW on float32 weights whose moments are torchao's block-wise 8-bit codes; needs the extra `int8`.

torchao's own step compiles a kernel for each shape, which needs a compiler at run time. This one runs torchao's
arithmetic unchanged, a part of a weight at a time, so that its temporaries stay small on every device.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from opd_mcp.schemas.memory import BLOCK
from opd_mcp.schemas.recipes import OptimizerRecipe

SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class EightBitAdamW(AdamW8bit):
    """AdamW8bit that steps without a compiler; `exact` weights, and those that torchao spares, keep float32 moments.

    A step goes over `chunk` elements at a time, a multiple of a block. Embeddings must be exact: a token's row has no
    gradient in most steps, and where the second moment's code is 0 while the first moment's is not, a step without a
    gradient divides by `eps` alone.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: OptimizerRecipe, *, exact: Iterable[Tensor], chunk: int
    ) -> None:
        super().__init__(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, block_size=BLOCK)
        self._exact, self._chunk = frozenset(exact), chunk

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every weight that has a gradient."""
        assert closure is None, "the gradient is there already"
        for group in self.param_groups:
            rate = torch.as_tensor(group["lr"], dtype=torch.float32)
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group, rate)

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, with plain tensors only: a moment's codes, scales and map are entries of their own."""
        found = super().state_dict()
        return {**found, "state": {number: _flattened(entries) for number, entries in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, to the bit."""
        # the base class would cast codes to the weight's dtype
        super().load_state_dict({**state_dict, "state": {}})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, tensors in state_dict["state"].items():
            self.state[weights[number]] = _rebuilt(tensors, weights[number])

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        return torch.zeros_like(p) if p in self._exact else super()._new_buffer(p, signed)

    def _move(self, weight: nn.Parameter, group: dict[str, Any], rate: Tensor) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state.update({name: self._new_buffer(weight, signed) for name, signed in SIGNED.items()})
        state["step"] += 1
        weights, gradients = weight.data.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, len(weights), self._chunk):
            part = slice(start, start + self._chunk)
            single_param_adam(
                weights[part],
                gradients[part],
                state["step"],
                _part(state["exp_avg"], part),
                _part(state["exp_avg_sq"], part),
                None,
                rate,
                beta1,
                beta2,
                group["weight_decay"],
                group["eps"],
                self.is_adamw,
                self.bf16_stochastic_round,
            )


def _part(moment: Tensor, part: slice) -> Tensor:
    """A view of a moment's flat values; writing to it writes to the moment."""
    if not isinstance(moment, OptimState8bit):
        return moment.view(-1)[part]
    scales = moment.scale[part.start // BLOCK : part.stop // BLOCK]
    return OptimState8bit(moment.codes.view(-1)[part], scales, moment.qmap, moment.signed, moment.dtype)


def _flattened(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in entries.items():
        if isinstance(value, OptimState8bit):
            flat |= {f"{name}.{attribute}": getattr(value, attribute) for attribute in value.tensor_attrs}
        else:
            flat[name] = value
    return flat


def _rebuilt(flat: dict[str, Tensor], weight: nn.Parameter) -> dict[str, Tensor]:
    state = {
        name: value.detach().to("cpu" if name == "step" else weight.device, copy=True) for name, value in flat.items()
    }
    for name, signed in SIGNED.items():
        if name not in state:
            parts = (state.pop(f"{name}.{attribute}") for attribute in OptimState8bit.tensor_attrs)
            state[name] = OptimState8bit(*parts, signed, weight.dtype)
    return state
