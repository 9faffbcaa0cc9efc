"""The worker: the one process that does a run's work, from its place in the queue to its final state.

It holds the run's lock for its whole life, takes a device lease, and only then imports the engine.
"""

import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from opd_mcp.devices.hardware import free_disk, gpu_slot, gpus
from opd_mcp.devices.leases import Lease, LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.planning.quotas import out_of_hours, seconds_left
from opd_mcp.planning.workload import expected_disk, expected_flops
from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.schemas.runs import PhaseName, RunRecord, RunState
from opd_mcp.store.files import is_disk_full
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import (
    LOG_FILE,
    RunLock,
    begin_attempt,
    cancel_requested,
    read_record,
    run_directory,
    taken_up,
    use_reserve,
)
from opd_mcp.store.settings import read_settings
from opd_mcp.store.store import Store
from opd_mcp.store.worker_process import note_start
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.failures import DiskFigures, MemoryFigures, failure_of
from opd_mcp.worker.fetch import prepared_record
from opd_mcp.worker.journal_reporter import JournalReporter
from opd_mcp.worker.log import logging_to_stderr, take_over_libraries
from opd_mcp.worker.pipeline import Pipeline, run_cancelled
from opd_mcp.worker.stage_calls import StageCalls, Stages
from opd_mcp.worker.watchdog import WatchSettings, watching

logger = logging.getLogger(__name__)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

WATCH = WatchSettings()


def engine_stages() -> Stages:
    """The real stages; torch and transformers are imported here."""
    import torch  # noqa: F401  first, since what is imported after it logs by its handler

    take_over_libraries()
    from opd_mcp.engine import stages

    return stages


def main(
    workspace_root: Path,
    run_id: str,
    lock_fd: int | None = None,
    lease_folder: Path | None = None,
    cpu_slots: int | None = None,
    load_stages: Callable[[], Stages] = engine_stages,
    teacher_key: str | None = None,
    watch: WatchSettings = WATCH,
    secrets: tuple[str, ...] = (),
) -> int:
    """Do the run's work; 0 when it succeeded or was cancelled, 1 when it failed. `teacher_key` is for a remote teacher.

    `secrets` are kept out of the journal.
    Raises UnknownIdError `unknown_run`, and RunError `run_locked` when another process works on the run.
    """
    workspace = Workspace(workspace_root)
    directory = run_directory(workspace, run_id)
    if lock_fd is None:
        lock = RunLock.acquire(directory)
        begin_attempt(lock)
    else:
        lock = RunLock.adopt(directory, lock_fd)
    defaults = JobSettings()
    leases = LeaseFolder(lease_folder or defaults.lease_folder, cpu_slots or defaults.cpu_slots)
    with lock, logging_to_stderr(), taken_up(lock) as journal:
        journal.secrets = secrets
        return work(Store(workspace), directory, journal, leases, load_stages, teacher_key, watch)


def work(
    store: Store,
    directory: Path,
    journal: JournalWriter,
    leases: LeaseFolder,
    load_stages: Callable[[], Stages],
    teacher_key: str | None = None,
    watch: WatchSettings = WATCH,
) -> int:
    """Queue, run and end the run of a directory whose lock is held; every way out leaves a final state."""
    reporter = JournalReporter(journal, directory)
    with reporter.ending_on_sigterm(), watching(reporter.pulse, reporter.alert, watch):
        return _worked(store, directory, journal, reporter, leases, load_stages, teacher_key)


def _worked(
    store: Store,
    directory: Path,
    journal: JournalWriter,
    reporter: JournalReporter,
    leases: LeaseFolder,
    load_stages: Callable[[], Stages],
    teacher_key: str | None,
) -> int:
    launch_seconds = time.time() - psutil.Process().create_time()
    try:
        journal.check_fence()
        note_start(directory, journal.attempt)
        record = read_record(directory)
        quotas = read_settings(store.workspace).quotas
        lease = device_lease(record.request.recipe.runtime, leases, directory.name, reporter)
        prepare_environment(record.request.recipe.runtime, lease, store.workspace.compiled)
        journal.append("state", {"state": "running"})
        reporter.limit(seconds_left(quotas, directory))
        with run_span(record):
            kind = device_kind(lease)
            result = run_phases(
                store, directory, record, journal, reporter, kind, load_stages, teacher_key, launch_seconds
            )
        journal.append("result", result)
        return _ended(journal, "succeeded")
    except Exception as error:
        return _ended_by(error, store, directory, journal, reporter)


def run_phases(
    store: Store,
    directory: Path,
    record: RunRecord,
    journal: JournalWriter,
    reporter: JournalReporter,
    device: str,
    load_stages: Callable[[], Stages],
    teacher_key: str | None = None,
    launch_seconds: float = 0.0,
) -> dict[str, Any]:
    """The result of all phases; the stages are loaded when a phase has to be computed, not before."""
    record = prepared_record(store, record, journal, reporter)
    from opd_mcp.engine.context import Context

    recipe = record.request.recipe

    def loaded() -> Stages:
        stages = load_stages()
        take_over_libraries()
        return stages

    context = Context(
        runtime=recipe.runtime,
        prompting=recipe.prompting,
        reporter=reporter,
        teacher_key=teacher_key,
        checkpoint=recipe.checkpoint,
        made_here=store.artifacts.made_here,
        check_fence=journal.check_fence,
    )
    pipeline = Pipeline(
        record=record,
        directory=directory,
        artifacts=store.artifacts,
        journal=journal,
        reporter=reporter,
        calls=StageCalls(record, directory, context, loaded),
        device=device,
        flops=lambda name: expected_flops(name, recipe, record.request.inputs),
        disk=lambda name: expected_disk(name, recipe, record.request.inputs),
        launch_seconds=launch_seconds,
    )
    return pipeline.run()


def device_lease(runtime: RuntimeRecipe, leases: LeaseFolder, owner: str, reporter: JournalReporter) -> Lease:
    """The lease of one GPU, or of as many CPU slots as the run has threads; raises RunError `run_cancelled`."""
    found = [] if runtime.device == "cpu" else sorted(gpus(), key=lambda gpu: -gpu.free_memory)
    slots = [gpu_slot(gpu) for gpu in found] or leases.cpu_slot_names()
    count = 1 if found else min(runtime.threads, len(slots))
    lease = leases.acquire(owner, slots, count, reporter.should_stop)
    if lease is None:
        raise run_cancelled()
    return lease


def device_kind(lease: Lease) -> str:
    """`cuda` or `cpu`."""
    return "cuda" if lease.slots[0].startswith("gpu-") else "cpu"


def prepare_environment(runtime: RuntimeRecipe, lease: Lease, compiled: Path) -> None:
    """Threads, visible devices and the compilers' folder for torch, which reads them when it is imported.

    What a compiler has cached is run as code: it belongs into the workspace, not into a shared /tmp.
    """
    assert "torch" not in sys.modules, "torch was imported before the lease"
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(runtime.threads)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    visible = lease.slots[0].removeprefix("gpu-") if device_kind(lease) == "cuda" else ""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = str(compiled), str(compiled / "triton")


@contextmanager
def run_span(record: RunRecord) -> Iterator[None]:
    """A span around a run's work, a child of the tool call that started it."""
    from opentelemetry import propagate, trace

    attributes = {"opd.run_id": record.run_id, "opd.kind": record.request.kind}
    context = propagate.extract(record.trace_context)
    name = f"run {record.request.kind}"
    with trace.get_tracer("opd-mcp").start_as_current_span(name, context=context, attributes=attributes):
        yield


def stop_cause(store: Store, directory: Path, reporter: JournalReporter) -> OpdError | None:
    """Why a run stopped that no user asked to stop; None when a user did."""
    if reporter.terminated:
        return worker_terminated()
    if reporter.out_of_time and not cancel_requested(directory):
        return out_of_hours(store.workspace, directory)
    return None


def worker_terminated() -> RunError:
    """The error of a run whose process was told to end."""
    return RunError(
        "worker_terminated",
        "The worker was told to end (SIGTERM): somebody stopped it, or the machine was shutting down.",
        fix="Call resume_run to go on from the last checkpoint; a phase without one yet begins anew.",
    )


def disk_figures(directory: Path, phase: PhaseName | None) -> DiskFigures:
    """What the phase was expected to write, and what is free for it now."""
    needed = 0
    if phase is not None:
        request = read_record(directory).request
        needed = expected_disk(phase, request.recipe, request.inputs)
    return DiskFigures(needed, free_disk(directory), directory)


def memory_figures(directory: Path) -> MemoryFigures:
    """The most memory that this process held, on the GPU where it used one, and what its plan expected."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    try:
        expected = read_record(directory).expected_memory_bytes
    except OpdError:
        expected = None  # a run.json that cannot be read is what the failure itself tells of
    return MemoryFigures(peak, expected)


def _ended_by(
    error: Exception, store: Store, directory: Path, journal: JournalWriter, reporter: JournalReporter
) -> int:
    """The exit status after the final state that an exception leads to; none for an attempt that is superseded."""
    try:
        journal.check_fence()
    except RunError as fence:  # nothing of this run is this process's any more, whatever else went wrong for it
        logger.warning("%s", fence)
        return 1
    if not isinstance(error, OpdError):
        logger.error("The run failed", exc_info=error)
        return _failed(journal, reporter, directory, error)
    stopped = error.code == "run_cancelled"
    cause = stop_cause(store, directory, reporter) if stopped else error
    return _ended(journal, "cancelled") if cause is None else _failed(journal, reporter, directory, cause)


def _failed(journal: JournalWriter, reporter: JournalReporter, directory: Path, error: Exception) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_disk_full(error):
        use_reserve(directory)
    disk = disk_figures(directory, reporter.current)
    failure = failure_of(error, directory / LOG_FILE, memory_figures(directory), disk)
    journal.append("error", failure.to_dict())
    return _ended(journal, "failed")


def _ended(journal: JournalWriter, state: RunState) -> int:
    journal.append("state", {"state": state})
    return int(state == "failed")
