"""What each precision keeps: bytes, bits, updates; schedules and parameter groups."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.optim import (
    NarrowAdamW,
    build_optimizer,
    joined,
    learning_rate_at,
    split,
    stochastically_rounded,
)
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.memory import ModelShape, optimizer_bytes, weight_bytes
from opd_mcp.schemas.recipes import OptimizerRecipe
from opd_mcp.schemas.resolve import lost_share

EIGHT_BIT = pytest.param("fp32_master_8bit", marks=pytest.mark.needs("torchao"))
NARROW = ("split_master", "bf16_stochastic", "bf16")


def rates(schedule: str, *, warmup: int = 2, steps: int = 6) -> list[float]:
    recipe = OptimizerRecipe(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate_at(step, steps, recipe) for step in range(steps)]


def test_constant_holds_after_warm_up() -> None:
    assert rates("constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_towards_zero() -> None:
    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates("cosine")[4] == pytest.approx(0.5)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert rates("constant", warmup=0)[0] == 1.0


@pytest.mark.parametrize("precision", ["fp32_master", EIGHT_BIT, *NARROW])
def test_weight_decay_is_for_matrices_only(tiny_model: Callable[..., PreTrainedModel], precision: str) -> None:
    recipe = OptimizerRecipe(weight_decay=0.1, learning_rate=1e-3, precision=precision)
    decayed, spared = build_optimizer(tiny_model(seed=0), recipe, seed=0).param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert spared["weight_decay"] == 0
    assert all(parameter.ndim < 2 for parameter in spared["params"])


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def test_high_and_low_part_are_the_float32_number_to_the_bit() -> None:
    """Every kind of number: random bit patterns, ties, zeros, denormals, the largest."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32).view(torch.float32)
    ties = (torch.arange(1, 1000, dtype=torch.int32) * 0x10000 + 0x8000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028234e38, -3.4028234e38, float("inf")])
    master = torch.cat([random[random.isfinite()], ties, -ties, special])
    high, low = split(master)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(joined(high, low)), bits(master))


def test_the_high_part_is_the_nearest_bf16_number() -> None:
    """A tie may go the other way than torch's rounding: it is as near."""
    master = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    distance = (split(master)[0].float() - master).abs()
    assert torch.equal(distance, (master.to(torch.bfloat16).float() - master).abs())


def bytes_a_parameter(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> float:
    """Of weight, gradient and the state that grows with the weight: not the step, nor the map of 8-bit codes."""
    state = optimizer.state_dict()["state"][0]
    held = [weight, weight.grad, *(value for name, value in state.items() if not name.endswith(("step", "qmap")))]
    return sum(tensor.nbytes for tensor in held) / weight.numel()


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32_master", 16),
        pytest.param("fp32_master_8bit", 10.03125, marks=pytest.mark.needs("torchao")),
        ("split_master", 12),
        ("bf16_stochastic", 10),
        ("bf16", 10),
    ],
)
def test_bytes_a_parameter_are_those_of_the_estimate(precision: str, expected: float) -> None:
    model = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(model, OptimizerRecipe(learning_rate=1e-3, precision=precision), seed=0)
    model(torch.ones(2, 64, dtype=model.weight.dtype)).float().sum().backward()
    optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype is torch.float32
    assert bytes_a_parameter(optimizer, model.weight) == expected
    shape = ModelShape(64 * 64, layers=1, hidden=64, query_width=64, kv_width=64, intermediate=64, vocab=0)
    assert expected == weight_bytes(precision) + 4 + optimizer_bytes(precision, shape) / shape.parameters


def rounded_moments(reference: torch.optim.Optimizer) -> None:
    for state in reference.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(state[name].to(torch.bfloat16))


def adamw_on_masters(masters: list[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in masters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, foreach=False)


def test_a_split_training_is_float32_adamw_with_bf16_moments_to_the_bit(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime
) -> None:
    """The reference keeps float32 masters, gives the model their nearest bf16, and rounds its moments."""
    recipe = OptimizerRecipe(learning_rate=2e-3, precision="split_master")
    rng = np.random.default_rng(0)
    rows = build_sequences(*([rng.integers(2, 13, size=n).tolist() for n in (3, 5, 2, 8)] for _ in range(2)))

    def gradients(model: PreTrainedModel) -> None:
        accumulate_gradients(model, StepData(rows, np.arange(4)), SFT_OBJECTIVE, StepSettings("token", 12, runtime))

    ours, twin = (tiny_model(13, seed=0, dtype=torch.float32, initializer_range=0.3) for _ in range(2))
    masters = [nn.Parameter(weight.detach().clone()) for weight in twin.parameters()]
    reference = adamw_on_masters(masters, recipe)
    for weight in twin.parameters():
        weight.data = weight.data.to(torch.bfloat16)
        weight.grad_dtype = torch.float32
    optimizer = build_optimizer(ours, recipe, seed=0)
    assert isinstance(optimizer, NarrowAdamW)
    for step in range(12):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = recipe.learning_rate / (1 + step)
        gradients(ours)
        optimizer.step()
        optimizer.zero_grad()
        gradients(twin)
        for master, weight in zip(masters, twin.parameters(), strict=True):
            master.grad = weight.grad
        reference.step()
        rounded_moments(reference)
        for master, weight in zip(masters, twin.parameters(), strict=True):
            weight.data.copy_(master)
            weight.grad = None
    optimizer.restore_masters()
    for weight, master in zip(ours.parameters(), masters, strict=True):
        assert weight.dtype is torch.float32
        assert torch.equal(weight, master)
    assert sum((a.bfloat16().float() != a).sum() for a in masters) > 100


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator) * 10.0 ** torch.randint(-6, 6, (500,), generator=generator)
    draws = 4000
    rounded = stochastically_rounded(values.repeat(draws, 1), generator).double()
    below = (bits(values) & -0x10000).view(torch.float32).double()  # towards zero
    gap = ((bits(values) & -0x10000) + 0x10000).view(torch.float32).double() - below
    assert ((rounded == below) | (rounded == below + gap)).all()
    share = (values.double() - below) / gap
    spread = gap.abs() * (share * (1 - share) / draws).sqrt()
    assert ((rounded.mean(0) - values.double()).abs() <= 5 * spread + 1e-12 * gap.abs()).all()


def test_numbers_that_bf16_holds_are_never_changed_by_stochastic_rounding() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(stochastically_rounded(values.float(), torch.Generator().manual_seed(1)), values)


def weight_after(precision: str, *, rate: float, seed: int = 0, steps: int = 10, size: int = 1 << 16) -> list:
    """The weights before and after each step on noisy gradients, spread as a language model's."""
    model = nn.Linear(size, 1, bias=False)
    model.weight.data = torch.randn(1, size, generator=torch.Generator().manual_seed(1)) * 0.02
    recipe = OptimizerRecipe(learning_rate=rate, precision=precision, weight_decay=0.0)
    optimizer = NarrowAdamW([{"params": [model.weight], "weight_decay": 0.0}], recipe, seed=seed)
    noise, found = torch.Generator().manual_seed(2), [model.weight.data.clone()]
    for _ in range(steps):
        model.weight.grad = torch.randn(1, size, generator=noise) + 0.3
        optimizer.step()
        found.append(model.weight.data.clone())
    return found


def test_nearest_bf16_loses_98_percent_of_the_updates_at_the_papers_rate() -> None:
    *_, before, after = weight_after("bf16", rate=2e-6)
    lost = (before == after).float().mean().item()
    assert lost >= 0.98
    assert lost_share(2e-6) == pytest.approx(lost, abs=0.02)


def test_stochastic_rounding_keeps_the_mean_update_at_the_papers_rate() -> None:
    """Gradients lean to +0.3, so all weights fall; what the exact master moves by is what the mean must move by."""
    exact = nn.Linear(1 << 16, 1, bias=False)
    exact.weight.data = weight_after("bf16", rate=2e-6, steps=0)[0].float()
    reference = torch.optim.AdamW(exact.parameters(), lr=2e-6, betas=(0.9, 0.98), weight_decay=0.0)
    start, noise = exact.weight.detach().clone(), torch.Generator().manual_seed(2)
    for _ in range(10):
        exact.weight.grad = torch.randn(1, 1 << 16, generator=noise) + 0.3
        reference.step()
    expected = (exact.weight - start).mean().item()
    stochastic, nearest = (weight_after(name, rate=2e-6) for name in ("bf16_stochastic", "bf16"))
    moved = [(run[-1].double() - run[0].double()).mean().item() for run in (stochastic, nearest)]
    assert moved[0] == pytest.approx(expected, rel=0.1)
    assert abs(moved[1]) < 0.1 * abs(expected)


def test_stochastic_rounding_follows_from_the_seed() -> None:
    runs = [weight_after("bf16_stochastic", rate=2e-6, seed=seed)[-1] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_bf16_at_a_low_rate_is_refused_with_the_share_that_would_be_lost() -> None:
    recipe = OptimizerRecipe(learning_rate=2e-6, precision="bf16")
    with pytest.raises(ArgumentError, match="98% of the updates") as caught:
        build_optimizer(nn.Linear(2, 2), recipe, seed=0)
    assert caught.value.code == "lossy_precision"
    assert "bf16_stochastic" in caught.value.fix
    build_optimizer(nn.Linear(2, 2), recipe.model_copy(update={"learning_rate": 1e-4}), seed=0)


@pytest.mark.parametrize("precision", NARROW)
def test_bf16_moments_that_would_stand_still_are_refused(precision: str) -> None:
    recipe = OptimizerRecipe(learning_rate=1e-3, betas=(0.9, 0.999), precision=precision)
    with pytest.raises(ArgumentError, match="stand still"):
        build_optimizer(nn.Linear(2, 2), recipe, seed=0)
    held = torch.tensor(1.5, dtype=torch.bfloat16)
    assert (held.float() * 0.999).bfloat16() == held
    assert (held.float() * 0.98).bfloat16() < held


def test_a_weight_longer_than_a_chunk_moves_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_mcp.engine.training import optim

    whole = weight_after("split_master", rate=1e-3, steps=3, size=1000)[-1]
    monkeypatch.setattr(optim, "CHUNK", 7)
    assert torch.equal(weight_after("split_master", rate=1e-3, steps=3, size=1000)[-1], whole)
