"""AdamW on the weights that the precision keeps, and the learning-rate schedule.

`fp32_master`: float32 weights, moments and gradients; bf16 exists only inside autocast. `fp32_master_8bit`: the same
with 8-bit moments (`eight_bit.py`). `split_master`: bf16 weights and the 16 bits that they lack, together the exact
float32 master. `bf16_stochastic`, `bf16`: nothing but bf16 weights. The last three keep bf16 moments and float32
gradients.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opd_mcp.engine.runtime import generator_for
from opd_mcp.schemas.recipes import OptimizerRecipe
from opd_mcp.schemas.resolve import require_kept_updates, require_package

# elements that a step widens to float32 at a time
CHUNK = 1 << 22


def build_optimizer(
    model: nn.Module,
    settings: OptimizerRecipe,
    *,
    seed: int,
    section: str = "optimizer",
    weights: Iterable[nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """AdamW for the model, whose weights are turned into what the precision keeps; decay on matrices only.

    `seed` is that of stochastic rounding; `weights` are the trained ones where a rank holds a part of the model.
    Raises ArgumentError `lossy_precision` or ResourceError `missing_package`, naming the recipe's `section`.
    """
    require_kept_updates(settings, section)
    require_package(settings, section)
    parameters = [weight for weight in (model.parameters() if weights is None else weights) if weight.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.precision == "fp32_master":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
    if settings.precision == "fp32_master_8bit":
        from opd_mcp.engine.training.eight_bit import EightBitAdamW  # torchao is there only with its extra

        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        return EightBitAdamW(groups, settings, exact=embeddings, chunk=CHUNK)
    return NarrowAdamW(groups, settings, seed=seed)


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW in float32 arithmetic on bf16 weights and moments; state per parameter: step, moments, `low` of a split.

    The random stream of stochastic rounding follows from the seed and the step's number, so it needs no saving.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerRecipe, *, seed: int) -> None:
        super().__init__(groups, {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps})
        self._precision, self._seed = settings.precision, seed
        for weight in self._weights():
            master = weight.data.float()
            state = self.state[weight]
            if self._precision == "split_master":
                weight.data, state["low"] = split(master)
            else:
                weight.data = master.to(torch.bfloat16)
            weight.grad_dtype = torch.float32
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight.data), torch.zeros_like(weight.data)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None, "the gradient is there already"
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                self.state[weight]["step"] += 1
                if self._precision == "bf16_stochastic" and generator is None:
                    number = int(self.state[weight]["step"])
                    generator = generator_for(self._seed, "rounding", number, device=weight.device)
                self._move(weight, group, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, each state in its own dtype."""
        super().load_state_dict(state_dict)
        # the base class casts every state to its weight's dtype, and `low` holds bits
        for number, weight in enumerate(self._weights()):
            for name, value in state_dict["state"][number].items():
                place = "cpu" if name == "step" else weight.device
                self.state[weight][name] = value.detach().to(place, copy=True)

    @torch.no_grad()
    def restore_masters(self) -> None:
        """Give the model its master weights, which is what is saved: float32 of a split, bf16 otherwise."""
        if self._precision == "split_master":
            for weight in self._weights():
                weight.data = joined(weight.data, self.state[weight].pop("low"))

    def _weights(self) -> Iterator[nn.Parameter]:
        return (weight for group in self.param_groups for weight in group["params"])

    def _move(self, weight: nn.Parameter, group: dict[str, Any], generator: torch.Generator | None) -> None:
        state, (beta1, beta2), rate = self.state[weight], group["betas"], group["lr"]
        step = int(state["step"])
        size, scale = rate / (1 - beta1**step), (1 - beta2**step) ** 0.5
        flat = {name: value.flatten() for name, value in state.items() if name != "step"}
        weights, gradients = weight.data.flatten(), weight.grad.flatten()  # type: ignore[union-attr]
        for start in range(0, len(weights), CHUNK):
            part = slice(start, start + CHUNK)
            narrow, gradient, low = weights[part], gradients[part], flat.get("low")
            master = narrow.float() if low is None else joined(narrow, low[part])
            first = flat["exp_avg"][part].float().lerp_(gradient, 1 - beta1)
            second = flat["exp_avg_sq"][part].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            flat["exp_avg"][part], flat["exp_avg_sq"][part] = first, second
            master.mul_(1 - rate * group["weight_decay"])
            master.addcdiv_(first, (second.sqrt() / scale).add_(group["eps"]), value=-size)
            if low is not None:
                weights[part], low[part] = split(master)
            elif generator is not None:
                weights[part] = stochastically_rounded(master, generator)
            else:
                weights[part] = master


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 number nearest to each float32 one, and the difference of their bits as int16."""
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` took apart, to the bit."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 of float32 values: one of the two neighbours, the nearer one more often, so that the mean is the value."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.contiguous().view(torch.int32) + noise
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step of all groups have this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_at(step: int, steps: int, settings: OptimizerRecipe) -> float:
    """The rate of step 0 … steps − 1: linear warm-up, then constant, linear to zero, or cosine to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.learning_rate * factors[settings.schedule]
