"""A run as its journal and its lock show it: the one fold of the journal, line by line as it grows."""

import statistics
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import ACTIVE_STATES, FINAL_STATES, Alert, Failure, MetricTrend, PhaseName, Progress, RunState
from opd_mcp.store.journal import JournalReader, JournalRecord
from opd_mcp.store.runs import JOURNAL_FILE, cancel_requested_at, is_alive
from opd_mcp.store.states import state_of

TREND_POINTS = 20
RATE_POINTS = 20
MAX_ALERTS = 20

Points = dict[int, float | None]
"""A metric's values by step; None for one that was not finite."""


@dataclass
class RunView:
    """The current state of one run; `refresh` reads what is new. Not for use from several threads at once.

    `keep_series` keeps every point of every metric; without it only those that the present trends need.
    """

    directory: Path
    keep_series: bool = False
    state: RunState = "queued"
    phase: PhaseName | None = None
    phases_done: list[str] = field(default_factory=list)
    progress: Progress | None = None
    alerts: list[Alert] = field(default_factory=list)
    alert_count: int = 0
    result: dict[str, Any] | None = None
    error: Failure | None = None
    costs: list[StageCost] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    """Artifact id by phase."""
    started_at: str | None = None
    phase_started_at: str | None = None
    finished_at: str | None = None
    updated_at: str | None = None
    cancel_requested: str | None = None
    """When a cancel was requested; None once the run has ended."""
    attempt: int = 0
    written: RunState = "queued"
    """The state that the journal ends with."""
    step: int | None = None
    records: int = 0

    def __post_init__(self) -> None:
        self._reader = JournalReader(self.directory / JOURNAL_FILE)
        self._points: dict[tuple[str, str], deque[tuple[int, float | None]]] = {}
        self._held: dict[int, tuple[str, str]] = {}
        self._begun_phase: PhaseName | None = None
        self._measured_phase: PhaseName | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=RATE_POINTS)

    def refresh(self) -> "RunView":
        """Fold the new lines of the journal and look at the lock; returns itself."""
        # The lock first: all that a process wrote before it ended is then seen; a finished run is never called lost.
        alive = is_alive(self.directory)
        self.fold()
        if self._reader.damage is not None and not any(alert.code == "damaged_journal" for alert in self.alerts):
            self._alert(self.updated_at or "", "damaged_journal", self._reader.damage.message)
        self.state = state_of(self.written, alive)
        self.cancel_requested = cancel_requested_at(self.directory) if self.state in ACTIVE_STATES else None
        return self

    def fold(self) -> "RunView":
        """Fold the new lines of the journal only, without checking the lock; returns itself."""
        for record in self._reader.new_records():
            self._fold(record)
        return self

    @property
    def device_seconds(self) -> float:
        """Seconds that the run's attempts held a device, from `running` to each attempt's last record."""
        return sum(max(seconds_of(last) - seconds_of(begun), 0.0) for begun, last in self._held.values())

    @property
    def series(self) -> dict[str, Points]:
        """By `phase.metric`, the kept values by step; values that a later attempt rewound are gone."""
        return {f"{phase}.{name}": dict(points) for (phase, name), points in self._points.items() if points}

    @property
    def metrics(self) -> dict[str, MetricTrend]:
        """Each metric's latest value and trend in the latest phase; the value is absent if it is not finite."""
        if self._measured_phase != self._begun_phase:
            return {}
        values = {
            name: [value for _, value in points][-TREND_POINTS:]
            for (phase, name), points in self._points.items()
            if points and phase == self._series_phase
        }
        return {
            name: MetricTrend(last=found[-1], trend=trend_of([value for value in found if value is not None]))
            for name, found in values.items()
        }

    def _fold(self, record: JournalRecord) -> None:
        self.records += 1
        self.updated_at = record.time
        if record.attempt in self._held:
            self._held[record.attempt] = self._held[record.attempt][0], record.time
        if record.attempt > self.attempt:
            self.attempt, self.error, self.finished_at = record.attempt, None, None
            self.phase = self.progress = self._begun_phase = None
        data = record.data
        match record.type:
            case "state":
                self._fold_state(record, data["state"])
            case "phase":
                self._fold_phase(record.time, data)
            case "progress":
                self._fold_progress(record.time, data)
            case "metric":
                self._fold_metrics(int(data["step"]), data["values"])
            case "alert":
                self._alert(record.time, data["code"], data["message"])
            case "result":
                self.result = {**(self.result or {}), **data}
            case "error":
                self.error = Failure.model_validate(data)

    def _fold_state(self, record: JournalRecord, state: RunState) -> None:
        self.written = state
        if state == "running":
            self._held[record.attempt] = record.time, record.time
            self.started_at = self.started_at or record.time
        if state in FINAL_STATES:
            self.finished_at = record.time
            self.phase = self.progress = None

    def _fold_phase(self, time: str, data: dict[str, Any]) -> None:
        name: PhaseName = data["phase"]
        if data["event"] == "started":
            self.phase = self._begun_phase = name
            self.phase_started_at = time
            self.progress = None
            self._pace.clear()
            return
        if data["event"] == "resumed":
            self._rewind(data["step"])
            return
        if name not in self.phases_done:
            self.phases_done.append(name)
        if "cost" in data:
            self.costs.append(StageCost.model_validate(data["cost"]))
        if "artifact_id" in data:
            self.artifacts[name] = data["artifact_id"]

    @property
    def _series_phase(self) -> str:
        return self._begun_phase or "run"

    def _fold_metrics(self, step: int, values: dict[str, float | None]) -> None:
        if self._measured_phase != self._begun_phase:  # another phase's loss is another quantity
            if not self.keep_series:
                self._points.clear()
            self._measured_phase = self._begun_phase
        self._rewind(step - 1)
        self.step = step
        for name, value in values.items():
            points = self._points.setdefault(
                (self._series_phase, name), deque(maxlen=None if self.keep_series else TREND_POINTS)
            )
            points.append((step, value))

    def _rewind(self, step: int) -> None:
        """Drop what an earlier attempt recorded of later steps of this phase."""
        self.step = None if self.step is None else min(self.step, step)
        for (phase, _), points in self._points.items():
            while phase == self._series_phase and points and points[-1][0] > step:
                points.pop()

    def _fold_progress(self, time: str, data: dict[str, Any]) -> None:
        done, total, unit = data["done"], data["total"], data["unit"]
        if self.progress is None or self.progress.unit != unit or done < self.progress.done:
            self._pace.clear()
        self._pace.append((seconds_of(time), done))
        (first_time, first_done), (last_time, last_done) = self._pace[0], self._pace[-1]
        rate = (last_done - first_done) / (last_time - first_time) if last_time > first_time else None
        eta = (total - done) / rate if rate else None
        self.progress = Progress(done=done, total=total, unit=unit, eta_s=eta, rate=rate)

    def _alert(self, time: str, code: str, message: str) -> None:
        self.alert_count += 1
        self.alerts = [*self.alerts, Alert(time=time, code=code, message=message)][-MAX_ALERTS:]


def trend_of(values: list[float]) -> Literal["up", "down", "flat"] | None:
    """A series' trend: its later half against its earlier one, `flat` within the noise; None below four values."""
    if len(values) < 4:
        return None
    half = len(values) // 2
    difference = statistics.fmean(values[-half:]) - statistics.fmean(values[:half])
    noise = statistics.stdev(values) / half**0.5
    if abs(difference) <= 2 * noise:
        return "flat"
    return "up" if difference > 0 else "down"


def seconds_of(time: str) -> float:
    """Seconds since the epoch of a time in the journal's form."""
    return datetime.fromisoformat(time).timestamp()
