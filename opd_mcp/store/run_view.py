"""A run as its journal and its lock show it: the one fold of the journal, line by line as it grows."""

import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import (
    ACTIVE_STATES,
    FINAL_STATES,
    Alert,
    Failure,
    MetricTrend,
    PhaseName,
    Progress,
    RunRecord,
    RunState,
    phase_label,
)
from opd_mcp.store.claims import BeatWatch
from opd_mcp.store.journal import JournalReader, JournalRecord
from opd_mcp.store.runs import JOURNAL_FILE, cancel_requested_at, is_alive, read_record, run_directory
from opd_mcp.store.series import KEPT_BYTES, Fold, Points, SeriesByName, read_fold, write_fold
from opd_mcp.store.states import state_of
from opd_mcp.store.workspace import Workspace

TREND_POINTS = 20
RATE_POINTS = 20
MAX_ALERTS = 20
MAX_VIEWS = 64
MAX_STATES = 20_000
Answer = TypeVar("Answer")
Kept = TypeVar("Kept")
# What a kept fold holds of a view as it is.
KEPT_FIELDS = (
    *("phase", "round", "phases_done", "alert_count", "result", "artifacts", "started_at", "phase_started_at"),
    *("finished_at", "updated_at", "attempt", "written", "step", "records"),
)


@dataclass
class RunView:
    """The current state of one run; `refresh` reads what is new. Not for use from several threads at once.

    `keep_series` keeps every point of every metric; without it only those that the present trends need.
    """

    directory: Path
    keep_series: bool = False
    state: RunState = "queued"
    phase: PhaseName | None = None
    round: int | None = None
    """Of several rounds, the number of the phase's."""
    phases_done: list[str] = field(default_factory=list)
    progress: Progress | None = None
    alerts: list[Alert] = field(default_factory=list)
    alert_places: list[tuple[str, int | None]] = field(default_factory=list)
    """Per alert, the phase that it was raised in, and the last step that was recorded by then."""
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
    watch: BeatWatch = field(default_factory=BeatWatch, repr=False)
    """What was seen of the heartbeats of runs on other machines."""

    def __post_init__(self) -> None:
        self._reader = JournalReader(self.directory / JOURNAL_FILE)
        self._points: SeriesByName = {}
        self._reached: int | None = None
        self._opened = False
        self._complete = True
        self._held: dict[int, tuple[str, str]] = {}
        self._begun_phase: PhaseName | None = None
        self._measured_phase: PhaseName | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=RATE_POINTS)

    def refresh(self) -> "RunView":
        """Fold the new lines of the journal and look at the lock; returns itself."""
        # The lock first: all that a process wrote before it ended is then seen; a finished run is never called lost.
        alive = is_alive(self.directory, self.watch)
        self.fold()
        damage = self._reader.damage
        if damage is not None and not any(alert.code == "damaged_journal" for alert in self.alerts):
            self._alert(self.updated_at or "", "damaged_journal", damage.message)
        self.state = state_of(self.written, alive)
        self.cancel_requested = cancel_requested_at(self.directory) if self.state in ACTIVE_STATES else None
        return self

    def fold(self) -> "RunView":
        """Fold the new lines of the journal only, without checking the lock; returns itself.

        The first time, a long journal's fold is taken from the file next to it, and kept there once it has grown.
        """
        first, self._opened = not self._opened, True
        kept = self._restore() if first and self._reader.size() >= KEPT_BYTES else 0
        # The first fold keeps all points: which of them the present trends need is known at its end.
        self._complete = first or self.keep_series
        for record in self._reader.each_new_record():
            self._fold(record)
        grown = self._reader.offset - kept
        if first and grown >= max(KEPT_BYTES, kept // 16) and self._reader.damage is None:
            write_fold(self.directory, Fold(self._reader.offset, self._state_dict(), self._reader.digest, self._points))
        if not self.keep_series:
            self._drop_old_points()
        return self

    def _restore(self) -> int:
        """Begin with the fold that is kept next to the journal; returns how many bytes of the journal it stands for."""
        fold = read_fold(self.directory, self._reader.path)
        if fold is None:
            return 0
        state = fold.state
        self._reader.resume(fold.offset, fold.digest, **state["reader"])
        for name in KEPT_FIELDS:
            setattr(self, name, state.get(name))  # one of an earlier version has no round
        self.progress = state["progress"] and Progress.model_validate(state["progress"])
        self.error = state["error"] and Failure.model_validate(state["error"])
        self.alerts = [Alert.model_validate(alert) for alert in state["alerts"]]
        self.alert_places = [(phase, step) for phase, step in state["alert_places"]]
        self.costs = [StageCost.model_validate(cost) for cost in state["costs"]]
        self._held = {int(attempt): (begun, last) for attempt, (begun, last) in state["held"].items()}
        self._begun_phase, self._measured_phase = state["phases"]
        self._pace.extend((seconds, done) for seconds, done in state["pace"])
        self._points = fold.series
        self._find_reached()
        return fold.offset

    def _state_dict(self) -> dict[str, Any]:
        """All that a fold holds besides its points, as JSON."""
        return {
            **{name: getattr(self, name) for name in KEPT_FIELDS},
            "reader": {"line": self._reader.line, "attempt": self._reader.attempt, "next_seq": self._reader.next_seq},
            "progress": self.progress and self.progress.model_dump(mode="json"),
            "error": self.error and self.error.model_dump(mode="json"),
            "alerts": [alert.model_dump(mode="json") for alert in self.alerts],
            "costs": [cost.model_dump(mode="json") for cost in self.costs],
            "alert_places": self.alert_places,
            "held": self._held,
            "phases": [self._begun_phase, self._measured_phase],
            "pace": list(self._pace),
        }

    @property
    def damaged(self) -> bool:
        """Whether lines of the journal could not be read."""
        return self._reader.damage is not None

    @property
    def device_seconds(self) -> float:
        """Seconds that the run's attempts held a device, from `running` to each attempt's last record."""
        return sum(max(seconds_of(last) - seconds_of(begun), 0.0) for begun, last in self._held.values())

    @property
    def series(self) -> dict[str, Points]:
        """By `phase.metric`, the kept values by step; values that a later attempt rewound are gone."""
        return {f"{phase}.{name}": points for (phase, name), points in self._points.items() if points}

    @property
    def metrics(self) -> dict[str, MetricTrend]:
        """Each metric's latest value and trend in the latest phase; the value is absent if it is not finite."""
        if self._measured_phase != self._begun_phase:
            return {}
        return {
            name: MetricTrend(
                last=points.last(), trend=trend_of([n for n in points.numbers[-TREND_POINTS:] if math.isfinite(n)])
            )
            for (phase, name), points in self._points.items()
            if points and phase == self._series_phase
        }

    def _fold(self, record: JournalRecord) -> None:
        self.records += 1
        self.updated_at = record.time
        if record.attempt in self._held:
            self._held[record.attempt] = self._held[record.attempt][0], record.time
        if record.attempt > self.attempt:
            self.attempt, self.error, self.finished_at = record.attempt, None, None
            self.phase = self.progress = self._begun_phase = None
            self._find_reached()
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
            self.round = data.get("round")
            self._find_reached()
            self.phase_started_at = time
            self.progress = None
            self._pace.clear()
            return
        if data["event"] == "resumed":
            self._rewind(data["step"])
            return
        label = phase_label(name, data.get("round"))
        if label not in self.phases_done:
            self.phases_done.append(label)
        if "cost" in data:
            self.costs.append(StageCost.model_validate(data["cost"]))
        if "artifact_id" in data:
            self.artifacts[name] = data["artifact_id"]

    @property
    def _series_phase(self) -> str:
        return self._begun_phase or "run"

    def _fold_metrics(self, step: int, values: dict[str, float | None]) -> None:
        if self._measured_phase != self._begun_phase:  # another phase's loss is another quantity
            if not self._complete:
                self._points.clear()
            self._measured_phase = self._begun_phase
            self._find_reached()
        if self._reached is not None and step <= self._reached:
            self._rewind(step - 1)
        self.step = self._reached = step
        for name, value in values.items():
            points = self._points.get((self._series_phase, name))
            if points is None:
                points = self._points[self._series_phase, name] = Points()
            points.append(step, value)
            if not self._complete and len(points) > 2 * TREND_POINTS:
                points.keep_last(TREND_POINTS)

    def _rewind(self, step: int) -> None:
        """Drop what an earlier attempt recorded of later steps of this phase."""
        self.step = None if self.step is None else min(self.step, step)
        for (phase, _), points in self._points.items():
            if phase == self._series_phase:
                points.rewind(step)
        self._find_reached()

    def _find_reached(self) -> None:
        own = [
            points.steps[-1] for (phase, _), points in self._points.items() if points and phase == self._series_phase
        ]
        self._reached = max(own, default=None)

    def _drop_old_points(self) -> None:
        self._points = {
            key: points for key, points in self._points.items() if key[0] == (self._measured_phase or "run")
        }
        for points in self._points.values():
            points.keep_last(TREND_POINTS)

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
        self.alert_places = [*self.alert_places, (self._series_phase, self._reached)][-MAX_ALERTS:]


def trend_of(values: Sequence[float]) -> Literal["up", "down", "flat"] | None:
    """A series' trend: its later half against its earlier one, `flat` within the noise; None below four values."""
    if len(values) < 4:
        return None
    half = len(values) // 2
    difference = math.fsum(values[-half:]) / half - math.fsum(values[:half]) / half
    mean = math.fsum(values) / len(values)
    noise = math.sqrt(math.fsum([(value - mean) ** 2 for value in values]) / (len(values) - 1)) / half**0.5
    if abs(difference) <= 2 * noise:
        return "flat"
    return "up" if difference > 0 else "down"


def seconds_of(time: str) -> float:
    """Seconds since the epoch of a time in the journal's form."""
    return datetime.fromisoformat(time).timestamp()


class RunViews:
    """The latest used views of a workspace's runs; safe to share between threads."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._views: OrderedDict[str, tuple[threading.Lock, RunView]] = OrderedDict()
        self._records: OrderedDict[str, RunRecord] = OrderedDict()
        self._written: OrderedDict[str, tuple[tuple[int, int, int], RunState]] = OrderedDict()
        self._judged: OrderedDict[str, tuple[tuple[int, int, int], str | None]] = OrderedDict()
        self._sparklines: OrderedDict[str, tuple[tuple[int, int, int], list[float]]] = OrderedDict()
        self.watch = BeatWatch()
        self._lock = threading.Lock()

    def read(self, run_id: str, answer: Callable[[RunView, RunRecord], Answer]) -> Answer:
        """What `answer` makes of the refreshed view and the record.

        Raises UnknownIdError `unknown_run`, IntegrityError `damaged_file`.
        """
        directory = run_directory(self._workspace, run_id)  # another process may have deleted it
        with self._lock:
            record = self._records.get(run_id)
        if record is None:
            record = read_record(directory)
            self._keep(self._records, run_id, record, MAX_VIEWS)
        return self.look(run_id, lambda view: answer(view, record))

    def forget(self, run_id: str) -> None:
        """Keep nothing of a run that was deleted."""
        with self._lock:
            self._records.pop(run_id, None)
            self._views.pop(run_id, None)
            self._written.pop(run_id, None)

    def look(self, run_id: str, answer: Callable[[RunView], Answer]) -> Answer:
        """What `answer` makes of the refreshed view; raises UnknownIdError `unknown_run`."""
        with self._lock:
            if run_id not in self._views:
                self._views[run_id] = (
                    threading.Lock(),
                    RunView(run_directory(self._workspace, run_id), watch=self.watch),
                )
            self._views.move_to_end(run_id)
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
            lock, view = self._views[run_id]
        with lock:
            return answer(view.refresh())

    def state(self, run_id: str) -> RunState:
        """A run's state now, its journal read only where it has changed; raises UnknownIdError `unknown_run`."""
        directory = self._workspace.run(run_id)
        alive = is_alive(directory, self.watch)  # before the journal, as `refresh` does
        signature = _signature(directory / JOURNAL_FILE)
        with self._lock:
            known = self._written.get(run_id)
        if known is not None and known[0] == signature:
            return state_of(known[1], alive)
        written, state = self.look(run_id, lambda view: (view.written, view.state))
        self._keep(self._written, run_id, (signature, written), MAX_STATES)
        return state

    def judgement(self, run_id: str) -> str | None:
        """What the result of an ended run says that it came to, its journal read once; raises as `state`.

        Of a damaged journal it says that: the line with the result may be the one that is missing.
        """
        signature = _signature(self._workspace.run(run_id) / JOURNAL_FILE)
        with self._lock:
            known = self._judged.get(run_id)
        if known is not None and known[0] == signature:
            return known[1]
        found = self.look(run_id, _judgement)
        self._keep(self._judged, run_id, (signature, found), MAX_STATES)
        return found

    def sparkline(self, run_id: str, draw: Callable[[RunView], list[float]]) -> list[float]:
        """What `draw` makes of the view with full series, again only once the journal has changed."""
        directory = self._workspace.run(run_id)
        signature = _signature(directory / JOURNAL_FILE)
        with self._lock:
            known = self._sparklines.get(run_id)
        if known is not None and known[0] == signature:
            return known[1]
        found = draw(RunView(directory, keep_series=True).fold())
        self._keep(self._sparklines, run_id, (signature, found), MAX_STATES)
        return found

    def _keep(self, kept: "OrderedDict[str, Kept]", run_id: str, value: Kept, limit: int) -> None:
        with self._lock:
            kept[run_id] = value
            kept.move_to_end(run_id)
            while len(kept) > limit:
                kept.popitem(last=False)


def _judgement(view: RunView) -> str | None:
    return "journal damaged" if view.damaged else (view.result or {}).get("verdict", {}).get("judgement")


def _signature(journal: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(journal)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
