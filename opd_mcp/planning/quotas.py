"""Quotas of a workspace: what a start or a resume is refused for, or will be, and how long a run has had its device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from opd_mcp.planning.memory import active_records
from opd_mcp.planning.workload import expected_disk
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import NextAction, next_call, resume_call
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.runs import Quotas, RunRecord, RunRequest
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.journal import JournalReader, JournalRecord
from opd_mcp.store.run_view import seconds_of
from opd_mcp.store.runs import JOURNAL_FILE
from opd_mcp.store.settings import SETTINGS_FILE, read_settings
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace

HOUR = 3600.0


def admission(store: Store, record: RunRecord) -> Callable[[], None]:
    """What must be called where starts take turns: it raises ResourceError `quota_exceeded` with the numbers.

    What does not change with other starts is measured before, so that nobody waits for it.
    """
    quotas = read_settings(store.workspace).quotas
    size = _workspace_bytes(quotas, store)

    def admit() -> None:
        directory = store.workspace.run(record.run_id)
        if quotas.max_gpu_hours is not None and used_seconds(directory) >= quotas.max_gpu_hours * HOUR:
            raise out_of_hours(store.workspace, directory)
        # A run that is being resumed holds its own lock already.
        active = [run_id for run_id in _active_runs(quotas, store) if run_id != record.run_id]
        for error in _exceeded(quotas, record.request, record.expected_seconds, size, active, None):
            raise error

    return admit


def quota_findings(store: Store, request: RunRequest, seconds: float | None) -> list[Finding]:
    """What a start of a planned request would be refused for now, with the numbers.

    One whose run is active already is refused nothing: a start gives that run.
    """
    quotas = read_settings(store.workspace).quotas
    active, again = _active_runs(quotas, store), next_call("start_distillation", plan_id=request.plan_id)
    errors = list(_exceeded(quotas, request, seconds, _workspace_bytes(quotas, store), active, again))
    if errors and any(record.request.plan_id == request.plan_id for record in active_records(store)):
        return []
    return [Finding.of_error(error) for error in errors]


def device_seconds(records: Iterable[JournalRecord]) -> float:
    """Seconds that a run's attempts held a device, from `running` to each attempt's last record."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for record in records:
        if record.type == "state" and record.data["state"] == "running":
            first[record.attempt] = seconds_of(record.time)
        last[record.attempt] = seconds_of(record.time)
    return sum(max(last[attempt] - begun, 0.0) for attempt, begun in first.items())


def used_seconds(directory: Path) -> float:
    """The device seconds of a run so far; 0.0 for one that has no journal yet."""
    return device_seconds(JournalReader(directory / JOURNAL_FILE).new_records())


def seconds_left(quotas: Quotas, directory: Path) -> float | None:
    """Seconds that a run may still hold its device; None without a bound."""
    if quotas.max_gpu_hours is None:
        return None
    return quotas.max_gpu_hours * HOUR - used_seconds(directory)


def out_of_hours(workspace: Workspace, directory: Path) -> ResourceError:
    """The error of a run that has had its device for as long as it may."""
    used, hours = used_seconds(directory) / HOUR, read_settings(workspace).quotas.max_gpu_hours
    message = f"The run has held its device for {used:.4g} h; max_gpu_hours is {hours}."
    return _refusal("max_gpu_hours", message, f"{used:.4g} h", resume_call(directory.name))


def _exceeded(
    quotas: Quotas,
    request: RunRequest,
    seconds: float | None,
    size: int,
    active: Sequence[str],
    again: NextAction | None,
) -> Iterator[ResourceError]:
    """An error for each quota that a run would break; `size` is what the workspace holds in bytes."""
    hours = (seconds or 0.0) / HOUR
    if quotas.max_gpu_hours is not None and hours > quotas.max_gpu_hours:
        message = f"The run is expected to hold its device for {hours:.4g} h; max_gpu_hours is {quotas.max_gpu_hours}."
        yield _refusal("max_gpu_hours", message, f"{hours:.4g} h", again, "take fewer steps or prompts, or ")
    if quotas.max_bytes is not None:
        pending = [phase.name for phase in request.phases if phase.satisfied_by is None]
        expected = sum(expected_disk(name, request.recipe, request.inputs) for name in pending)
        if size + expected > quotas.max_bytes:
            message = (
                f"The workspace holds {size} bytes and the run writes up to {expected}; "
                f"max_bytes is {quotas.max_bytes}."
            )
            yield _refusal("max_bytes", message, size + expected, again, "make room with opd-mcp gc, or ")
    if quotas.max_running_runs is not None and len(active) >= quotas.max_running_runs:
        count = f"{len(active)} runs are" if len(active) > 1 else f"{active[0]} is"
        message = f"{count} active, and max_running_runs lets {quotas.max_running_runs} be active at a time."
        other_way = f"wait for {active[0]} to end or cancel it, or "
        yield _refusal("max_running_runs", message, len(active), again, other_way)


def _active_runs(quotas: Quotas, store: Store) -> list[str]:
    return store.active_runs() if quotas.max_running_runs is not None else []


def _workspace_bytes(quotas: Quotas, store: Store) -> int:
    return tree_bytes(store.workspace.root) if quotas.max_bytes is not None else 0


def _refusal(name: str, message: str, value: object, again: NextAction | None, other_way: str = "") -> ResourceError:
    fix = f"{other_way}raise quotas.{name} in the workspace's {SETTINGS_FILE}; then make the call again."
    return ResourceError("quota_exceeded", message, value=value, fix=fix[0].upper() + fix[1:], call=again)
