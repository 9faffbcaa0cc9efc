"""What a start or a resume is refused for: too little memory or disk, and the quotas of the workspace."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from opd_mcp.devices.hardware import Target, available_memory, gpus
from opd_mcp.devices.leases import SHORT, LeaseFolder
from opd_mcp.planning.costs.run_workload import expected_disk
from opd_mcp.schemas.errors import IntegrityError, ResourceError
from opd_mcp.schemas.next_action import NextAction, next_call, resume_call
from opd_mcp.schemas.plans import Finding, MethodEstimate
from opd_mcp.schemas.runs import Quotas, RunRecord, RunRequest
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.run_view import RunView
from opd_mcp.store.store import Store
from opd_mcp.store.worker_process import WORKER_FILE, WorkerProcess
from opd_mcp.store.workspace import SETTINGS_FILE, Workspace, read_settings

HOUR = 3600.0
MEMORY_OVERRIDE: dict[str, Any] = {
    "distill.micro_batch_tokens": 4096,
    "sft.micro_batch_tokens": 4096,
    "score.micro_batch_tokens": 4096,
    "rollout.batch_size": 32,
}
RESUME_WAYS_OUT = {
    "not_enough_memory": "Resume the run once memory is free, or start again with lower micro_batch_tokens, "
    "rollout.batch_size or max_new_tokens; finished phases whose settings stay are reused.",
    "not_enough_disk": "Free disk space (opd-mcp gc shows what is unused), then resume the run.",
}


def with_claims(target: Target, store: Store, cpu_slots: int) -> Target:
    """The target with what active runs of the workspace are still expected to take there.

    A GPU belongs to one long run, so no run claims a part of it. On the CPU as many long runs work at a time as there
    are slots, and one short run: the largest others count, each with what it was expected to need and does not hold
    yet.
    """
    if target.kind != "cpu":
        return target
    records, all_on_cpu = active_records(store), not gpus()
    here = [record for record in records if record.request.executor is None]
    there = [record for record in here if all_on_cpu or record.request.recipe.runtime.device == "cpu"]
    claims = sorted((unclaimed(store, record) for record in there if not is_short(record)), reverse=True)
    short = max((unclaimed(store, record) for record in there if is_short(record)), default=0)
    return replace(target, claimed=sum(claims[: cpu_slots - 1]) + short)


# Longer work waits for its turn like any other.
SHORT_SECONDS = 600.0
SHORT_KINDS = frozenset({"sample", "export"})
ADMISSION_SECONDS = 2.0
GPU_MARGIN = 1 << 30


def is_short(record: RunRecord) -> bool:
    """Whether a run may use a device's slot for short runs.

    It is a sample or an export of known memory that takes ten minutes at most.
    """
    known = record.expected_memory_bytes is not None and record.expected_seconds is not None
    return record.request.kind in SHORT_KINDS and known and (record.expected_seconds or 0.0) <= SHORT_SECONDS


def short_admission(store: Store, record: RunRecord, leases: LeaseFolder) -> Callable[[str], bool]:
    """Whether a short run's memory is free next to the long runs of a device; looked at again every two seconds.

    On the CPU the other active runs of the workspace count with what they were expected to need and do not hold yet; on
    a GPU its holder counts with what it is expected to use at most, and one that does not say so admits nobody.
    """
    looked: dict[str, tuple[float, bool]] = {}

    def room(slot: str) -> int:
        uuid = slot.partition("gpu-")[2]
        if not uuid:
            others = [other for other in active_records(store) if other.run_id != record.run_id]
            claims = sorted((unclaimed(store, other) for other in others), reverse=True)
            return available_memory() - sum(claims[: leases.cpu_slots])
        gpu = next((gpu for gpu in gpus() if gpu.uuid == uuid), None)
        needed = leases.needed(slot.removeprefix(SHORT))
        if gpu is None or needed is None:
            return 0
        return gpu.total_memory - max(needed, gpu.total_memory - gpu.free_memory) - GPU_MARGIN

    def admits(slot: str) -> bool:
        at, admitted = looked.get(slot, (-ADMISSION_SECONDS, False))
        if time.monotonic() - at >= ADMISSION_SECONDS:
            admitted = room(slot) >= (record.expected_memory_bytes or 0)
            looked[slot] = time.monotonic(), admitted
        return admitted

    return admits


def active_records(store: Store) -> list[RunRecord]:
    """The records of the active runs; one that cannot be read claims nothing."""
    records = []
    for run_id in store.active_runs():
        with suppress(IntegrityError):
            records.append(store.record(run_id))
    return records


def unclaimed(store: Store, record: RunRecord) -> int:
    """Bytes that a run is expected to need and that its worker does not hold yet; 0 for a run without an estimate."""
    held = 0
    try:
        worker = WorkerProcess.from_json((store.workspace.run(record.run_id) / WORKER_FILE).read_bytes())
        process = psutil.Process(worker.pid)
        if process.create_time() == worker.started:
            held = process.memory_info().rss
    except (OSError, ValidationError, psutil.Error):
        held = 0  # a worker that is about to begin
    return max((record.expected_memory_bytes or 0) - held, 0)


def memory_shortage(needed: int, target: Target) -> Finding | None:
    """What is said when a run needs more than the target has: the numbers, and the overrides that lower the need."""
    if needed <= target.memory - target.claimed:
        return None
    claimed = f", and active runs are expected to take {byte_size(target.claimed)} more" if target.claimed else ""
    return Finding(
        code="not_enough_memory",
        message=f"It needs about {byte_size(needed)} of memory; {target.name} has {byte_size(target.memory)} "
        f"free{claimed}.",
        fix="Lower distill.micro_batch_tokens, sft.micro_batch_tokens, rollout.batch_size or max_new_tokens by "
        "overrides, choose smaller models, or wait until memory is free.",
    )


def resource_findings(estimate: MethodEstimate, target: Target, disk_free: int) -> list[Finding]:
    """What the device or the disk is too small for."""
    shortage = memory_shortage(estimate.peak_memory_bytes, target)
    findings = [shortage] if shortage else []
    if estimate.disk_bytes > disk_free:
        findings.append(
            Finding(
                code="not_enough_disk",
                message=f"It writes up to {byte_size(estimate.disk_bytes)}; the workspace's disk has "
                f"{byte_size(disk_free)} free.",
                fix="Free disk space, move the workspace (OPD_HOME), or lower rollout.count or score.topk.",
            )
        )
    return findings


def require_room(estimate: MethodEstimate | None, target: Target, disk_free: int, resumed: str | None = None) -> None:
    """Raise ResourceError `not_enough_memory` or `not_enough_disk` where a run does not fit; `resumed` is its id.

    None: a model of the run is still to be fetched, and nothing is known.
    """
    for finding in resource_findings(estimate, target, disk_free) if estimate else ():
        fix = RESUME_WAYS_OUT[finding.code] if resumed else finding.fix
        call = resume_call(resumed) if resumed else finding.call
        raise ResourceError(finding.code, finding.message, value=resumed, fix=fix, call=call)


def admission(store: Store, record: RunRecord) -> Callable[[], None]:
    """What must be called where starts take turns: it raises ResourceError `quota_exceeded` with the numbers.

    What does not change with other starts is measured before, so that no start waits for it.
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


def used_seconds(directory: Path) -> float:
    """The device seconds of a run so far; 0.0 for one that has no journal yet."""
    return RunView(directory).fold().device_seconds


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
