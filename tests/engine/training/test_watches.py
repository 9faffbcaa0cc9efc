"""The alerts of a distillation: once each, when most advantages were clipped, and when the rollouts are stale."""

import pytest
import torch

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.training.step import StepResult
from opd_mcp.engine.training.watches import (
    CLIPPED_SHARE,
    EFFECTIVE_SHARE,
    WATCHED_STEPS,
    DistillWatch,
    are_stale,
)
from opd_mcp.schemas.recipes import DistillRecipe


class ListeningReporter(SilentReporter):
    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []

    def alert(self, code: str, message: str) -> None:
        self.alerts.append((code, message))


def step(clipped: float, tokens: int = 100) -> StepResult:
    """A step in which this share of the tokens is 3 nats from the teacher, the others 0.1."""
    distance = torch.where(torch.arange(tokens) < clipped * tokens, 3.0, 0.1)
    return StepResult(0.0, torch.full((tokens,), -4.0), {"teacher_logprobs": -4.0 - distance}, tokens)


def alerts_of(shares: list[float], **settings: object) -> list[tuple[str, str]]:
    reporter = ListeningReporter()
    watch = DistillWatch(DistillRecipe(advantage_clip=1.0, **settings), Context(reporter=reporter))
    for share in shares:
        assert watch(step(share))["advantage_clipped"] == pytest.approx(share)
    return reporter.alerts


def test_most_advantages_clipped_is_told_once_with_its_meaning() -> None:
    [(code, message)] = alerts_of([0.9] * 5 * WATCHED_STEPS)
    assert code == "advantages_clipped"
    assert "90%" in message
    assert "±1" in message
    assert "only its sign counts" in message


@pytest.mark.parametrize(
    "shares",
    [[0.9] * (WATCHED_STEPS - 1), [0.9] * (WATCHED_STEPS // 2) + [0.0] * 50, [CLIPPED_SHARE] * 50],
    ids=["too few steps to tell", "only at the start", "half"],
)
def test_fewer_are_no_alert(shares: list[float]) -> None:
    assert alerts_of(shares) == []


def test_the_forward_kl_has_no_advantage_to_clip() -> None:
    assert alerts_of([0.9] * 50, estimator="topk_forward_kl") == []
    assert alerts_of([0.9] * 50, estimator="topk_reverse_kl")


def drifted(spread: float, tokens: int = 1000) -> StepResult:
    """A step whose student is `spread` nats (standard deviation) a token from the behaviour policy."""
    noise = torch.randn(tokens, generator=torch.Generator().manual_seed(0)) * spread
    columns = {"teacher_logprobs": torch.full((tokens,), -4.0), "behaviour_logprobs": -4.0 - noise}
    return StepResult(0.0, torch.full((tokens,), -4.0), columns, tokens)


def drift_alerts(spreads: list[float]) -> tuple[list[tuple[str, str]], list[float]]:
    reporter = ListeningReporter()
    watch = DistillWatch(DistillRecipe(), Context(reporter=reporter))
    return reporter.alerts, [watch(drifted(spread))["effective_sample_share"] for spread in spreads]


def test_stale_rollouts_are_told_once_with_the_share_and_the_way_out() -> None:
    [(code, message)], shares = drift_alerts([2.0] * 5 * WATCHED_STEPS)
    assert code == "rollouts_stale"
    assert f"effective_sample_share was {shares[0]:.3f}" in message
    assert shares[0] < EFFECTIVE_SHARE
    assert "build a teacher cache of new rollouts" in message


@pytest.mark.parametrize(
    "spreads",
    [[0.0] * 50, [1.0] * 50, [2.0] * (WATCHED_STEPS - 1), ([5.0] + [0.5] * 9) * 5],
    ids=["fresh", "drifting", "too few steps to tell", "single steps"],
)
def test_rollouts_that_still_tell_something_are_no_alert(spreads: list[float]) -> None:
    assert drift_alerts(spreads)[0] == []


def test_a_cache_without_behaviour_logprobs_cannot_be_stale() -> None:
    assert alerts_of([0.0] * 50) == []


def test_where_a_round_follows_stale_rollouts_begin_it() -> None:
    reporter = ListeningReporter()
    watch = DistillWatch(DistillRecipe(), Context(reporter=reporter), next_round=2)
    recent = [watch(drifted(2.0)) for _ in range(WATCHED_STEPS)]
    [(code, message)] = reporter.alerts
    assert (code, "round 2 begins" in message) == ("next_round", True)
    assert are_stale(recent)
    assert not are_stale(recent[1:]), "too few steps to tell"
    assert not are_stale([watch(drifted(0.5)) for _ in range(WATCHED_STEPS)])
