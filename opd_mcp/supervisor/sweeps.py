"""A sweep: one run per point, tagged with the sweep's id: of a grid or list from one cache, or of arms and seeds.

The id follows from the requests, so that the same call finds the runs that it started before.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from opd_mcp.planning.arms import ARM_TAG
from opd_mcp.planning.confirmation import Question, sweep_question
from opd_mcp.planning.phases import request_hash
from opd_mcp.schemas.answers import SweepStarted, SweptRun
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, OpdError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.requests import MAX_SWEPT, Sweep
from opd_mcp.schemas.runs import ACTIVE_STATES, RunLabels, RunRequest
from opd_mcp.store.store import Store
from opd_mcp.supervisor.launch import Supervisor
from opd_mcp.supervisor.records import NAME_CHARACTERS, setting_texts

Settings = Mapping[str, Any]


def swept_settings(arguments: Sweep) -> list[Settings]:
    """The settings of each run, each once, in the order given; the last key of a grid varies fastest.

    Raises ArgumentError `invalid_argument` for none, both of grid and points, more than 32, or a key that `overrides`
    sets as well.
    """
    if bool(arguments.grid) == bool(arguments.points):
        raise _invalid("A sweep tries a grid, or a list of points.", None, "Give grid or points, one of the two.")
    points: list[Settings] = [dict(point) for point in arguments.points]
    if arguments.grid:
        points = [dict(zip(arguments.grid, values, strict=True)) for values in product(*arguments.grid.values())]
    found = list({content_hash(point): point for point in points}.values())
    if len(found) > MAX_SWEPT:
        raise _invalid("A sweep has at most 32 runs.", len(found), "Give fewer values, or a list of points.")
    if both := sorted(arguments.overrides.keys() & {key for point in found for key in point}):
        raise _invalid("A key is swept and set by overrides.", ", ".join(both), "Leave it out of one of the two.")
    return found


def require_different(points: Sequence[Settings], requests: Sequence[RunRequest]) -> None:
    """Raise ArgumentError `invalid_argument` where two points are one run: a key that such a run does not read."""
    seen: dict[str, Settings] = {}
    for point, request in zip(points, requests, strict=True):
        other = seen.setdefault(request_hash(request.kind, request.phases), point)
        if other is not point:
            changed = sorted(key for key in {*point, *other} if point.get(key) != other.get(key))
            raise _invalid(
                "Two points of this sweep are the same run: a distillation from a cache reads nothing of what differs.",
                ", ".join(changed),
                "Sweep keys of distill.*, such as distill.steps; the cache holds what came before.",
            )


def _invalid(message: str, value: object, fix: str) -> ArgumentError:
    return ArgumentError("invalid_argument", message, value=value, fix=fix)


def sweep_id_of(requests: Sequence[RunRequest]) -> str:
    """The id, and the tag, of the sweep that these requests are."""
    return f"sweep-{content_hash(sorted(request_hash(request.kind, request.phases) for request in requests))[:12]}"


class Sweeps:
    """Starts the runs of sweeps in one workspace."""

    def __init__(self, store: Store, supervisor: Supervisor) -> None:
        self._store = store
        self._supervisor = supervisor

    def question(self, arguments: Sweep, requests: Sequence[RunRequest], gpu_hours: float) -> Question | None:
        """What the user must agree to: runs that together take a device for longer, or a teacher mismatch."""
        sweep_id = sweep_id_of(requests)
        done = self._runs_by_request(sweep_id)
        left = [request for request in requests if request_hash(request.kind, request.phases) not in done]
        seconds = sum(self._supervisor.expected_seconds(request) or 0.0 for request in left)
        return sweep_question(sweep_id, len(left), seconds, gpu_hours, arguments.allow_teacher_mismatch)

    def start(self, labels: RunLabels, points: Sequence[Settings], requests: Sequence[RunRequest]) -> SweepStarted:
        """Each point's run: the active or succeeded one that an equal call started, else a new one in the queue.

        What refuses a start ends the call, with the runs started so far; raises it where there are none.
        """
        sweep_id = sweep_id_of(requests)
        known = self._runs_by_request(sweep_id)
        runs: list[SweptRun] = []
        refused: list[str] = []
        expected = 0.0
        for point, request in zip(points, requests, strict=True):
            run_id = known.get(request_hash(request.kind, request.phases))
            if run_id is None:
                try:
                    started = self._supervisor.start(
                        request.model_copy(update={"labels": _labels(labels, sweep_id, point)})
                    )
                except OpdError as error:
                    if not runs:
                        raise
                    refused.append(f"{len(requests) - len(runs)} runs: {error.text()}")
                    break
                run_id, reused = started.run_id, started.reused
                record = self._store.record(run_id)
                expected += 0.0 if reused else record.expected_seconds or 0.0
            else:
                record, reused = self._store.record(run_id), True
            runs.append(
                SweptRun(
                    run_id=run_id,
                    name=record.request.labels.name,
                    state=self._store.views.state(run_id),
                    settings=dict(point),
                    reused=reused,
                )
            )
        return SweepStarted(
            sweep_id=sweep_id,
            runs=runs,
            expected_seconds=round(expected, 1) or None,
            not_started=refused,
            next_action=_next_action(sweep_id, runs),
        )

    def _runs_by_request(self, sweep_id: str) -> dict[str, str]:
        """By request hash, the newest run of the sweep that is active or has succeeded."""
        found: dict[str, str] = {}
        for row in self._store.index.runs(tag=sweep_id):
            gone = not self._store.exists(row.run_id)
            if row.request_hash in found or gone:
                continue
            if (row.final_state or self._store.views.state(row.run_id)) in {*ACTIVE_STATES, "succeeded"}:
                found[row.request_hash] = row.run_id
        return found


def _labels(labels: RunLabels, sweep_id: str, point: Settings) -> RunLabels:
    """What a run of a sweep is called: by its own settings, after the name of the sweep."""
    own = ", ".join(setting_texts(dict(point))) or "as preset"
    name = f"{labels.name}: {own}" if labels.name else own
    if len(name) > NAME_CHARACTERS:
        name = f"{name[: NAME_CHARACTERS - 1]}…"
    arm = [f"{ARM_TAG}{point['arm']}"] if "arm" in point else []
    return labels.model_copy(update={"name": name, "tags": [*labels.tags, sweep_id, *arm]})


def _next_action(sweep_id: str, runs: Sequence[SweptRun]) -> Any:
    active = [run.run_id for run in runs if run.state in ACTIVE_STATES]
    if not active:
        return next_call("compare_runs", "All of its runs have ended.", tag=sweep_id)
    why = f"The runs take their turns; when this one has ended, call compare_runs(tag='{sweep_id}')."
    return next_call("get_run_status", why, run_id=active[-1], wait_seconds=25)
