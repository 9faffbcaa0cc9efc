"""The answers of the reading tools: set-up, metrics, logs, artifacts, dashboard; and what gc removes."""

from typing import Any, Literal

from pydantic import Field

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.executors import ExecutorReport
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.reports import Curve, Judgement, ShownAnswers, StageCost, Verdict
from opd_mcp.schemas.runs import Alert, Progress, Quotas, RunKind, RunRow, RunState


class MetricSeries(Schema):
    """One metric of one phase, thinned out to `max_points`: each value is the mean up to its step.

    Points that are not finite are left out of the series and named by the diagnosis.
    """

    key: str = Field(description="phase.metric")
    steps: list[int]
    values: list[float]
    points: int = Field(description="recorded, before thinning out")
    last: float | None = None
    low: float | None = None
    high: float | None = None
    trend: Literal["up", "down", "flat"] | None = None


class RunMetrics(Schema):
    """One run's series and their diagnosis."""

    run_id: str
    kind: RunKind
    state: RunState
    series: list[MetricSeries]
    diagnosis: str


class MetricsReport(Schema):
    """The answer of `get_run_metrics`."""

    runs: list[RunMetrics]
    differences: dict[str, list[Any]] = Field(
        default_factory=dict, description="differing recipe keys and inputs, one value per run, in the order of `runs`"
    )
    dropped: list[str] = Field(default_factory=list, description="what was left out for length")


Interval = tuple[float, float, float]
"""A value, and the two ends of its 95 % interval."""


class ComparedRun(Schema):
    """One row of a comparison; what was not measured is absent."""

    run_id: str
    name: str | None = None
    kind: RunKind
    state: RunState
    settings: dict[str, Any] = Field(default_factory=dict, description="those that differ between the runs")
    model: str | None = Field(None, description="the measured model, as the report calls it")
    accuracy: Interval | None = None
    sampled_accuracy: Interval | None = None
    reverse_kl: Interval | None = Field(None, description="nats per token")
    baseline: str | None = None
    gain: Interval | None = Field(None, description="accuracy minus the baseline's, paired by prompt")
    verdict: Judgement | None = None
    seconds: float | None = Field(None, description="of the stages that this run computed itself")
    not_measured: str | None = Field(None, description="why there are no figures")


class PairedRuns(Schema):
    """The accuracy of two runs' models on the same prompts, paired by prompt."""

    candidate: str
    baseline: str
    accuracy_difference: Interval
    prompts: int


class ComparedArm(Schema):
    """The runs of one arm; `gain` and `kl_change` are the asked arm minus this one, paired by seed.

    Over one seed the gain is paired by prompt.
    """

    arm: str
    runs: int
    accuracy: float | None = Field(None, description="mean over its runs")
    reverse_kl: float | None = None
    seconds: float | None = Field(None, description="mean of all stages up to the student, made here or reused")
    gain: Interval | None = None
    kl_change: Interval | None = None


class RunComparison(Schema):
    """The answer of `compare_runs`: one table, oldest run first, from the reports alone."""

    settings: list[str] = Field(description="recipe keys and inputs that differ")
    runs: list[ComparedRun]
    best: str | None = Field(None, description="the run whose model is most accurate")
    paired: list[PairedRuns] = Field(default_factory=list, description="the best against each other run")
    arms: list[ComparedArm] = Field(default_factory=list, description="of runs that baselines or seeds started")
    notes: list[str] = Field(default_factory=list, description="how to read the table, and what is left out")
    basis: dict[str, str] = Field(default_factory=dict, description="how each figure was obtained")
    next_action: NextAction


class LogPage(Schema):
    """The answer of `get_run_logs`: lines in the order of writing."""

    run_id: str
    lines: list[str]
    next_cursor: str | None = Field(None, description="older lines")


class ArtifactRow(Schema):
    """An artifact in a list."""

    artifact_id: str
    kind: ArtifactKind
    path: str
    bytes: int
    created_at: str
    run_id: str | None = None


class ArtifactList(Schema):
    """A page of artifacts, newest first."""

    rows: list[ArtifactRow]
    total: int
    next_cursor: str | None = None
    damaged: list[str] | None = Field(None, description="artifacts left out: their record cannot be read")


class DeletedArtifact(Schema):
    """The answer of `delete_artifact`."""

    artifact_id: str
    freed_bytes: int
    next_action: NextAction


class DeletedRun(Schema):
    """The answer of `delete_run`."""

    run_id: str
    freed_bytes: int
    artifacts: list[str] = Field(default_factory=list, description="deleted with it")
    kept: dict[str, str] = Field(default_factory=dict, description="its artifacts that stay, and what needs them")
    next_action: NextAction


class SweptRun(Schema):
    """One run of a sweep."""

    run_id: str
    name: str | None = None
    state: RunState
    settings: dict[str, Any]
    reused: bool = Field(False, description="it was active, or had succeeded, before this call")


class SweepStarted(Schema):
    """The answer of `sweep`; `sweep_id` is also a tag of its runs."""

    sweep_id: str
    runs: list[SweptRun]
    expected_seconds: float | None = Field(None, description="of the runs that this call started, one after another")
    not_started: list[str] = Field(default_factory=list, description="why runs are missing; the same call adds them")
    next_action: NextAction


class ShownPhase(Schema):
    """A phase: done, running, waiting or stopped."""

    name: str
    state: str


class CurveMark(Schema):
    """Something that belongs to a step of a phase's curves."""

    phase: str
    step: int
    kind: Literal["alert", "checkpoint"]
    text: str


class RunDocument(Schema):
    """What a run wrote for people to read."""

    kind: Literal["report", "card"]
    path: str
    resource: str | None = Field(None, description="where an MCP client reads it")


class RunDetail(Schema):
    """What the page shows of a run and no agent needs from it: get_run_logs, resources and reports tell the same."""

    preset: str
    settings: dict[str, Any] = Field(description="by recipe key")
    changed: list[str] = Field(default_factory=list, description="recipe keys that differ from the preset")
    inputs: dict[str, str] = Field(default_factory=dict, description="by role")
    planned_seconds: dict[str, float] = Field(default_factory=dict, description="by phase")
    log: list[str] = Field(default_factory=list, description="the last lines")
    marks: list[CurveMark] = Field(default_factory=list)
    samples: list[ShownAnswers] = Field(default_factory=list)
    curves_of: dict[str, str] = Field(
        default_factory=dict, description="by reused phase, the run that made its result, whose curves are shown"
    )
    documents: list[RunDocument] = Field(default_factory=list)
    export: str | None = Field(None, description="where the run exported the student to")


class DashboardRun(Schema):
    """One run as the page draws it."""

    run_id: str
    kind: RunKind
    state: RunState
    verdict: Verdict | None = None
    created_at: str
    name: str | None = None
    tags: list[str] = Field(default_factory=list)
    notes: str | None = None
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
    teacher_row: str | None = Field(None, description="the teacher's name among the scores")
    error: str | None = None
    detail: RunDetail | None = Field(None, description="for the page alone")


class DashboardFeed(Schema):
    """The answer of `open_dashboard` and `dashboard_feed`."""

    runs: list[DashboardRun]
    listed: list[RunRow] = Field(default_factory=list, description="a page of runs to choose from, newest first")
    total: int = Field(0, description="runs that the filters let through")
    next_cursor: str | None = None
    sparks: dict[str, list[float]] = Field(
        default_factory=dict, description="by listed run, its training objective in a few points"
    )
    comparison: RunComparison | None = Field(None, description="where more than one run is chosen")


class Leftover(Schema):
    """Something that is unused."""

    kind: Literal["build", "deleted", "temporary", "checkpoints", "index", "artifact"]
    path: str
    bytes: int


class GarbageReport(Schema):
    """What is, or was, removed; `bytes` is their sum."""

    removed: bool
    bytes: int
    items: list[Leftover]
    kept: list[str] = Field(default_factory=list, description="what had to be kept, and why")


class Device(Schema):
    """A device that runs compute on; `slots` runs fit at the same time, `slots_busy` are taken."""

    kind: Literal["cpu", "cuda"]
    name: str
    uuid: str | None = Field(None, description="GPU UUID, the key of its lease")
    total_memory_bytes: int
    free_memory_bytes: int
    slots: int
    slots_busy: int = 0


class ActiveRun(Schema):
    """A queued or running run, in short."""

    run_id: str
    kind: str
    state: str
    phase: str | None = None


class Limits(Schema):
    """What one call may ask for."""

    wait_seconds: int = 25
    inline_prompts: int = 200
    inline_prompt_characters: int = 20_000
    baselines: int = 8
    list_limit: int = 100


class ExamplePaths(Schema):
    """Absolute paths of the embedded arithmetic task."""

    teacher: str
    teacher_other_style: str
    student: str
    prompts_sft: str
    prompts_opd: str
    prompts_tune: str
    prompts_eval: str


class SetupReport(Schema):
    """The answer of `inspect_setup`."""

    version: str
    python: str
    devices: list[Device]
    executors: list[ExecutorReport] | None = None
    free_disk_bytes: int
    workspace: str
    allowed_roots: list[str]
    export_roots: list[str] | None = Field(None, description="absent where nothing may be exported")
    active_runs: list[ActiveRun] = Field(default_factory=list)
    limits: Limits = Limits()
    quotas: Quotas = Quotas()
    problem: Finding | None = None
    presets: list[str] = Field(default_factory=lambda: ["quick", "paper", "demo"])
    example: ExamplePaths | None = None
    next_action: NextAction
