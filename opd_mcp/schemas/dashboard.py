"""What the dashboard's feed sends."""

from typing import Any

from pydantic import Field

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import Alert, Progress, RunKind, RunRow, RunState


class ShownPhase(Schema):
    """A phase: done, running, waiting or stopped."""

    name: str
    state: str


class Curve(Schema):
    """A metric's finite points, thinned out."""

    key: str
    steps: list[int]
    values: list[float]


class DashboardRun(Schema):
    """One run as the page draws it."""

    run_id: str
    kind: RunKind
    state: RunState
    created_at: str
    models: str
    phases: list[ShownPhase]
    progress: Progress | None = None
    eta_s: float | None = None
    elapsed_s: float | None = None
    curves: list[Curve] = Field(default_factory=list)
    alerts: list[Alert] = Field(default_factory=list)
    costs: list[StageCost] = Field(default_factory=list)
    scores: dict[str, Any] = Field(default_factory=dict)
    comparisons: list[Any] = Field(default_factory=list)
    error: str | None = None


class DashboardFeed(Schema):
    """The answer of `dashboard_feed`."""

    runs: list[DashboardRun]
    listed: list[RunRow] = Field(default_factory=list, description="the newest runs, to choose from")
