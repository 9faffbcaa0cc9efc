"""The clip's alert: once, when most advantages of the last steps were beyond it."""

import pytest
import torch

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.training.clipping import ALERT_SHARE, WATCHED_STEPS, ClipWatch
from opd_mcp.engine.training.step import StepResult
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
    watch = ClipWatch(DistillRecipe(advantage_clip=1.0, **settings), Context(reporter=reporter))
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
    [[0.9] * (WATCHED_STEPS - 1), [0.9] * (WATCHED_STEPS // 2) + [0.0] * 50, [ALERT_SHARE] * 50],
    ids=["too few steps to tell", "only at the start", "half"],
)
def test_fewer_are_no_alert(shares: list[float]) -> None:
    assert alerts_of(shares) == []


def test_the_forward_kl_has_no_advantage_to_clip() -> None:
    assert alerts_of([0.9] * 50, estimator="topk_forward_kl") == []
    assert alerts_of([0.9] * 50, estimator="topk_reverse_kl")
