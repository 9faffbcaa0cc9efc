"""Quotas of a workspace: what a start or a resume is refused for, and how long a run has had its device."""

from collections.abc import Callable, Iterable
from pathlib import Path

from opd_mcp.jobs.workload import expected_disk
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.schemas.settings import Quotas
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.journal import JournalReader, JournalRecord
from opd_mcp.store.runs import JOURNAL_FILE
from opd_mcp.store.settings import SETTINGS_FILE, read_settings
from opd_mcp.store.store import Store
from opd_mcp.store.view import seconds_of
from opd_mcp.store.workspace import Workspace

HOUR = 3600.0


def admission(store: Store, record: RunRecord) -> Callable[[], None]:
    """What must be called where starts take turns: it raises ResourceError `quota_exceeded` with the numbers.

    What does not change with other starts is measured before, so that nobody waits for it.
    """
    quotas = read_settings(store.workspace).quotas
    size = tree_bytes(store.workspace.root) if quotas.max_bytes is not None else 0

    def admit() -> None:
        _require_hours(quotas, record, store.workspace)
        _require_bytes(quotas, record, size)
        _require_place(quotas, record, store)

    return admit


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
    return _exceeded("max_gpu_hours", message, "call resume_run")


def _require_hours(quotas: Quotas, record: RunRecord, workspace: Workspace) -> None:
    if quotas.max_gpu_hours is None:
        return
    directory = workspace.run(record.run_id)
    used, expected = used_seconds(directory) / HOUR, (record.expected_seconds or 0.0) / HOUR
    if used >= quotas.max_gpu_hours:
        raise out_of_hours(workspace, directory)
    if expected > quotas.max_gpu_hours:
        message = (
            f"The run is expected to hold its device for {expected:.4g} h; max_gpu_hours is {quotas.max_gpu_hours}."
        )
        raise _exceeded("max_gpu_hours", message, "call again", "take fewer steps or prompts, or ")


def _require_bytes(quotas: Quotas, record: RunRecord, size: int) -> None:
    if quotas.max_bytes is None:
        return
    request = record.request
    pending = [phase.name for phase in request.phases if phase.satisfied_by is None]
    expected = sum(expected_disk(name, request.recipe, request.inputs) for name in pending)
    if size + expected > quotas.max_bytes:
        message = (
            f"The workspace holds {size} bytes and the run writes up to {expected}; max_bytes is {quotas.max_bytes}."
        )
        raise _exceeded("max_bytes", message, "call again", "make room with opd-mcp gc, or ")


def _require_place(quotas: Quotas, record: RunRecord, store: Store) -> None:
    if quotas.max_running_runs is None:
        return
    # A run that is being resumed holds its own lock already.
    active = [run_id for run_id in store.active_runs() if run_id != record.run_id]
    if len(active) >= quotas.max_running_runs:
        message = f"{len(active)} runs are active; max_running_runs is {quotas.max_running_runs}."
        raise _exceeded("max_running_runs", message, "call again", f"wait for {active[0]} or cancel it, or ")


def _exceeded(name: str, message: str, again: str, other_way: str = "") -> ResourceError:
    fix = f"{other_way}raise quotas.{name} in the workspace's {SETTINGS_FILE}, then {again}."
    return ResourceError("quota_exceeded", message, value=name, fix=fix[0].upper() + fix[1:])
