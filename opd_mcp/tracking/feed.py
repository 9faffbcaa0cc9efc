"""What a tracker is told of a run: its settings once, then metrics, events and the end, as the journal has them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from opd_mcp.schemas.resolve import leaves
from opd_mcp.schemas.runs import FINAL_STATES, ModelInput, RunRecord, RunState
from opd_mcp.store.journal import JournalReader, JournalRecord
from opd_mcp.store.run_view import seconds_of

PHASE_WITHOUT_NAME = "run"


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker shows it; `folder` is where the tracker keeps files on this machine."""

    run_id: str
    name: str
    tags: list[str]
    notes: str | None
    config: dict[str, Any]
    folder: Path
    created: float

    @classmethod
    def of(cls, record: RunRecord, folder: Path) -> "TrackedRun":
        """The run of a record: names of models, recipe, versions and hardware; no path, prompt or response."""
        labels, request, inputs = record.request.labels, record.request, record.request.inputs
        models = {"student": inputs.student, "teacher": inputs.teacher, "model": inputs.model}
        about = {
            "run_id": record.run_id,
            "kind": request.kind,
            **{role: model_name(model) for role, model in models.items() if model is not None},
            "hardware": record.hardware,
            **{f"version.{name}": number for name, number in record.versions.items()},
        }
        return cls(
            run_id=record.run_id,
            name=labels.name or record.run_id,
            tags=[request.kind, *labels.tags],
            notes=labels.notes,
            config=about | dict(leaves(request.recipe.to_dict())),
            folder=folder,
            created=seconds_of(record.created_at),
        )


def model_name(model: ModelInput) -> str:
    """A model's Hub id or artifact id, else the last part of its path."""
    return model.hub_id or model.artifact_id or Path(model.path or model.reference).name


@dataclass(frozen=True)
class Metrics:
    """Finite values of one step; `time` in seconds since the epoch."""

    phase: str
    step: int
    values: dict[str, float]
    time: float


@dataclass(frozen=True)
class Event:
    """Something that a person wants to see next to the curves: an alert, or a failure's cause."""

    title: str
    text: str
    level: str
    time: float


@dataclass(frozen=True)
class Entry:
    """What one journal line tells a tracker, and the bytes of the journal up to its end."""

    told: Metrics | Event | None
    offset: int


@dataclass
class JournalFeed:
    """The journal's lines in order, as entries; what it has passed is folded into the fields."""

    journal: Path
    phase: str = PHASE_WITHOUT_NAME
    state: RunState | None = None
    attempt: int = 0
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = JournalReader(self.journal)

    def entries(self, most: int) -> list[Entry]:
        """The next lines, at most so many; fewer only at the journal's present end."""
        return list(islice(self._each(), most))

    def _each(self) -> Iterator[Entry]:
        for record in self._reader.each_new_record():
            yield Entry(self._told(record), self._reader.offset)

    def _told(self, record: JournalRecord) -> Metrics | Event | None:
        data, time = record.data, seconds_of(record.time)
        self.attempt = max(self.attempt, record.attempt)
        match record.type:
            case "state":
                self.state = data["state"]
            case "phase" if data["event"] == "started":
                self.phase = data["phase"]
            case "result":
                self.result |= data
            case "metric":
                values = {
                    name: float(value)
                    for name, value in data["values"].items()
                    if value is not None and math.isfinite(value)
                }
                return Metrics(self.phase, int(data["step"]), values, time) if values else None
            case "alert":
                return Event(data["code"], data["message"], "warn", time)
            case "error":
                return Event(data["code"], f"{data['cause']} {data['fix']}", "error", time)
        return None

    @property
    def ended(self) -> bool:
        """Whether the last line that was read ends the run."""
        return self.state in FINAL_STATES


def final_figures(result: dict[str, Any]) -> dict[str, float | str]:
    """The verdict and each model's figures of a result, by names such as `student.greedy_accuracy`."""
    figures: dict[str, float | str] = {}
    verdict = result.get("verdict")
    if isinstance(verdict, dict):
        figures |= {f"verdict.{key}": verdict[key] for key in ("judgement", "sentence") if key in verdict}
    for name, value in leaves(result.get("scores") or {}):
        number = value[0] if isinstance(value, list) and value else value  # an interval begins with its value
        if isinstance(number, int | float) and math.isfinite(number):
            figures[name] = float(number)
    return figures
