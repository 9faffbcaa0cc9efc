"""Schedules and parameter groups."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from opd_mcp.engine.training.optimizer import build_optimizer, learning_rate_at
from opd_mcp.schemas.recipes import OptimizerRecipe


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


def test_weight_decay_is_for_matrices_only(tiny_model: Callable[..., PreTrainedModel]) -> None:
    optimizer = build_optimizer(tiny_model(seed=0), OptimizerRecipe(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert spared["weight_decay"] == 0
    assert all(parameter.ndim < 2 for parameter in spared["params"])
