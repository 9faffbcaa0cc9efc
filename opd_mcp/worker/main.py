"""The worker: the one process that does a run's work, from its place in the queue to its final state.

It holds the run's lock for its whole life, takes a device lease, and only then imports the engine.
"""

import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from opd_mcp.devices.hardware import free_disk, gpus, visible_gpus
from opd_mcp.devices.leases import Lease, LeaseFolder
from opd_mcp.planning.costs.admission import out_of_hours, seconds_left
from opd_mcp.planning.costs.run_workload import expected_disk, workload_of
from opd_mcp.planning.engines import required_program
from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.schemas.reports import TrainingSummary
from opd_mcp.schemas.runs import ExportSettings, PhaseName, RunRecord, RunState
from opd_mcp.store.claims import RunClaim, read_claim
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
from opd_mcp.store.store import Store
from opd_mcp.store.worker_process import note_start, stop_of
from opd_mcp.store.workspace import Workspace, grace_seconds, read_settings
from opd_mcp.worker.engines import (
    EngineModel,
    EngineProgram,
    ManagedEngine,
    free_ports,
    side_by_side,
)
from opd_mcp.worker.exporting import GgufConverter
from opd_mcp.worker.failures import DiskFigures, MemoryFigures, failure_of
from opd_mcp.worker.fetch import prepared_record
from opd_mcp.worker.guardian import guarded
from opd_mcp.worker.held_engine import HeldEngine, address_of
from opd_mcp.worker.journal_reporter import JournalReporter
from opd_mcp.worker.log import logging_to_stderr, take_over_libraries
from opd_mcp.worker.pipeline import Pipeline
from opd_mcp.worker.run_devices import (
    device_groups,
    device_kind,
    device_lease,
    far_ranks,
    gpu_of,
    rank_devices,
    runtime_here,
)
from opd_mcp.worker.stage_calls import StageCalls, Stages
from opd_mcp.worker.teams.far_ranks import FarRank
from opd_mcp.worker.teams.helpers import HelperTeam
from opd_mcp.worker.teams.ranks import GROUP_SECONDS, RankTeam, RankWork
from opd_mcp.worker.watchdog import WatchSettings, watching

logger = logging.getLogger(__name__)
# sysexits.h: a temporary failure. The script of a cluster's job requeues it then.
REQUEUE_STATUS = 75
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def engine_stages() -> Stages:
    """The real stages; torch and transformers are imported here."""
    import torch  # noqa: F401  first, since what is imported after it logs by its handler

    take_over_libraries()
    from opd_mcp.engine import stages

    return stages


@dataclass(frozen=True)
class WorkerSettings:
    """What its launcher gives a worker: `teacher_key` for a remote teacher, `secrets` to keep out of the journal, and
    `hub_token` for uploads.
    """

    leases: LeaseFolder
    teacher_key: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    load_stages: Callable[[], Stages] = engine_stages
    watch: WatchSettings = field(default_factory=WatchSettings)
    group_seconds: float = GROUP_SECONDS
    """After how long a rank that does not answer the others counts as lost, and a helper that is overdue."""
    hub_token: str | None = field(default=None, repr=False)
    ticket: str | None = field(default=None, repr=False)
    """Of a job on an executor's machines, what its claim names; `life` counts its restarts."""
    life: int = 0
    hosts: tuple[str, ...] = ()
    """The machines of a job that has several, this one first."""
    visible_gpus: str | None = None
    """The GPUs that the job was given, as CUDA_VISIBLE_DEVICES has them; None: all."""


def main(workspace_root: Path, run_id: str, lock_fd: int | None, settings: WorkerSettings) -> int:
    """Do the run's work; 0 when it succeeded or was cancelled, 1 when it failed.

    `lock_fd` is the run's lock, inherited from the launcher; None: it is acquired here, for a new attempt.
    Raises UnknownIdError `unknown_run`, and RunError `run_locked` when another process works on the run.
    """
    workspace = Workspace(workspace_root)
    directory = run_directory(workspace, run_id)
    lock: RunLock | RunClaim
    if settings.ticket is not None:
        lock = RunClaim.begun_by(directory, settings.ticket, settings.life).beating()
    elif lock_fd is None:
        lock = RunLock.acquire(directory)
        begin_attempt(lock)
    else:
        lock = RunLock.adopt(directory, lock_fd)
    with lock, logging_to_stderr(), taken_up(lock) as journal:
        journal.secrets = settings.secrets
        with guarded(directory, journal.attempt, grace_seconds(workspace)):
            claim = lock if isinstance(lock, RunClaim) else None
            return RunWorker(Store(workspace), directory, journal, settings, claim).work()


class RunWorker:
    """One attempt at a run whose lock is held; every way out leaves a final state."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        journal: JournalWriter,
        settings: WorkerSettings,
        claim: RunClaim | None = None,
    ) -> None:
        self.store = store
        self.directory = directory
        self.journal = journal
        self.settings = settings
        self.claim = claim
        self.reporter = JournalReporter(journal, directory)

    def work(self) -> int:
        """Queue, run and end the run; the exit status."""
        reporter = self.reporter
        with reporter.ending_on_sigterm(), watching(reporter.pulse, reporter.alert, self.settings.watch):
            try:
                self.journal.append("result", self._result())
                return self._end("succeeded")
            except Exception as error:
                return self._end_by(error)

    def _result(self) -> dict[str, Any]:
        """The result of all phases, which are computed once the run has its device."""
        launch_seconds = time.time() - psutil.Process().create_time()
        self.journal.check_fence()
        note_start(self.directory, self.journal.attempt)
        record = read_record(self.directory)
        quotas = read_settings(self.store.workspace).quotas
        runtime = record.request.recipe.runtime
        found = None if self.settings.visible_gpus is None else visible_gpus(gpus(), self.settings.visible_gpus)
        here = runtime_here(runtime, self.settings.hosts)
        lease = device_lease(self.store, record, here, self.settings.leases, self.reporter, found)
        prepare_environment(runtime, lease, self.store.workspace.compiled)
        self.journal.append("state", {"state": "running"})
        self.reporter.limit(seconds_left(quotas, self.directory))
        with run_span(record):
            record = prepared_record(self.store, record, self.journal, self.reporter)
            return self._pipeline(record, lease, launch_seconds).run()

    def _pipeline(self, record: RunRecord, lease: Lease, launch_seconds: float) -> Pipeline:
        """The run's phases; the stages are loaded only when a phase must be computed."""
        from opd_mcp.engine.context import Context, EngineAddress, EngineWish

        recipe, inputs, device = record.request.recipe, record.request.inputs, device_kind(lease)
        workload = workload_of(recipe, inputs)
        far = far_ranks(recipe.runtime, lease, self.settings.hosts)
        devices = rank_devices(runtime_here(recipe.runtime, self.settings.hosts), lease)
        devices, engine_starts = devices or ([gpu_of(lease)] if far else []), list[float]()

        @contextmanager
        def start_engine(wish: EngineWish) -> Iterator[list[EngineAddress]]:
            # what is loaded already no longer counts as free, so this leaves more than is needed
            room = workload.work("distill").memory if wish.beside_training and workload else None
            model = EngineModel(wish.model, wish.dtype, wish.length, wish.topk, room, reloads=wish.beside_training)
            begun = time.monotonic()
            with side_by_side(self._engines(wish.kind, model, device, devices)) as engines:
                engine_starts.append(time.monotonic() - begun)
                yield [address_of(one) for one in engines]

        def loaded() -> Stages:
            stages = self.settings.load_stages()
            take_over_libraries()
            return stages

        engine = HeldEngine(start_engine)
        context = Context(
            runtime=recipe.runtime,
            prompting=recipe.prompting,
            reporter=self.reporter,
            teacher_key=self.settings.teacher_key,
            checkpoint=recipe.checkpoint,
            made_here=self.store.artifacts.made_here,
            check_fence=self.journal.check_fence,
            rendered_at=datetime.fromisoformat(record.created_at),
            start_engine=engine.serving,
            convert_to_gguf=gguf_converter(read_settings(self.store.workspace).export, self.reporter.should_stop),
        )
        return Pipeline(
            record=record,
            directory=self.directory,
            artifacts=self.store.artifacts,
            journal=self.journal,
            reporter=self.reporter,
            calls=StageCalls(
                record,
                self.directory,
                context,
                loaded,
                on_ranks=self._on_ranks(devices, far),
                helpers=self._helpers(devices, recipe.runtime),
            ),
            device=device,
            flops=lambda name: workload.work(name).flops if workload else 0.0,
            disk=lambda name: expected_disk(name, recipe, inputs),
            launch_seconds=launch_seconds,
            hub_token=self.settings.hub_token,
            engine_starts=engine_starts,
            engine=engine,
        )

    def _on_ranks(
        self, devices: list[str | None], far: Sequence[FarRank]
    ) -> Callable[[StageCalls, PhaseName, Path, int | None], TrainingSummary] | None:
        """What trains a phase in one process per device; None where the run trains in this one."""
        reporter = self.reporter
        answers: dict[str, Callable[..., Any]] = {
            "phase": reporter.phase,
            "progress": reporter.progress,
            "metric": reporter.metric,
            "alert": reporter.alert,
            "resumed": reporter.resumed,
            "position": reporter.position,
            "should_stop": reporter.should_stop,
            "check_fence": self.journal.check_fence,
        }
        questions: dict[str, Callable[..., Any]] = {
            "made_here": lambda directory: self.store.artifacts.made_here(Path(directory))
        }

        def train(calls: StageCalls, name: PhaseName, output: Path, number: int | None) -> TrainingSummary:
            facts = {
                # a fetched model's path was added after it was sealed
                "record": calls.record.model_copy(update={"self_sha256": ""}).to_dict(),
                "directory": str(self.directory),
                "paths": {role: str(path) for role, path in calls.paths.items()},
                "phase": name,
                "round": number,
                "output": str(output),
            }
            work = RankWork(facts, devices, self.directory, self.settings.group_seconds, far=far)
            return RankTeam(work, answers, questions).trained()

        return train if devices else None

    def _helpers(
        self, devices: list[str | None], runtime: RuntimeRecipe
    ) -> Callable[[], AbstractContextManager[HelperTeam | None]]:
        """Who computes parts of a phase on the run's other devices; nobody where it has one."""
        if len(devices) < 2:
            return nullcontext
        alert, patience = self.reporter.alert, self.settings.group_seconds
        return lambda: HelperTeam(devices[1:], runtime, self.directory, alert, patience).working()

    def _engines(
        self, kind: str, model: EngineModel, device: str, devices: Sequence[str | None]
    ) -> list[ManagedEngine]:
        """Engines as this workspace's settings name them, one per device; raises ResourceError `missing_package`."""
        workspace, reporter, on_gpu = self.store.workspace, self.reporter, device == "cuda"
        settings = read_settings(workspace).engines
        path, caches = required_program(kind, settings), workspace.compiled / "engines"
        groups = device_groups(model.path, devices, on_gpu)
        return [
            ManagedEngine(
                EngineProgram(kind, path, caches, on_gpu, group),
                model,
                self.directory,
                settings,
                reporter.should_stop,
                reporter.alert,
                port=port,
                number=number,
            )
            for number, (group, port) in enumerate(zip(groups, free_ports(len(groups)), strict=True))
        ]

    def _end_by(self, error: Exception) -> int:
        """The exit status, after the final state that an exception leads to; a superseded attempt records none."""
        try:
            self.journal.check_fence()
        except RunError as fence:  # another attempt owns this run now; that outranks any other failure here
            logger.warning("%s", fence)
            return 1
        if not isinstance(error, OpdError):
            logger.error("The run failed", exc_info=error)
            return self._fail(error)
        cause = self._stop_cause() if error.code == "run_cancelled" else error
        if cause is not None and cause.code == "worker_terminated" and self._is_restarted():
            return self._queue_again()
        return self._end("cancelled") if cause is None else self._fail(cause)

    def _is_restarted(self) -> bool:
        """Whether whoever sent SIGTERM begins this job anew: a cluster, at a time limit or a preemption."""
        written = read_claim(self.directory, self.claim.attempt) if self.claim else None
        return written is not None and written.placing.kind == "slurm"

    def _queue_again(self) -> int:
        """Queue the next attempt for this job's restart; the exit status that its script knows."""
        assert self.claim is not None, "only a claimed attempt is restarted"
        message = "The cluster stopped the job, at its time limit or for another one; it continues in its next turn."
        self.journal.append("alert", {"code": "preempted", "message": message})
        with self.claim.next() as following:
            begin_attempt(following)
        return REQUEUE_STATUS

    def _stop_cause(self) -> OpdError | None:
        """Why a run stopped without a user's request; None if a user requested it."""
        if cancel_requested(self.directory):  # SIGTERM may have followed it
            return None
        if self.reporter.terminated:
            return RunError(
                "worker_terminated",
                "The worker received SIGTERM: it was stopped, or the machine was shutting down.",
                fix="Resume the run: it continues from its last checkpoint; a phase without one starts again.",
                call=resume_call(),
            )
        if self.reporter.out_of_time:
            return out_of_hours(self.store.workspace, self.directory)
        return None

    def _fail(self, error: Exception) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        if is_disk_full(error):
            use_reserve(self.directory)
        disk = disk_figures(self.directory, self.reporter.current)
        failure = failure_of(error, self.directory / LOG_FILE, memory_figures(self.directory), disk)
        self.journal.append("error", failure.to_dict())
        return self._end("failed")

    def _end(self, state: RunState) -> int:
        stop = stop_of(self.directory, self.journal.attempt)
        if stop is not None:
            self.journal.append("alert", {"code": "worker_signalled", "message": stop.text()})
        self.journal.append("state", {"state": state})
        return int(state == "failed")


def gguf_converter(settings: ExportSettings, should_stop: Callable[[], bool]) -> GgufConverter | None:
    """The converter that the settings name."""
    if settings.gguf_converter is None:
        return None
    return GgufConverter(Path(settings.gguf_converter), Path(settings.gguf_python or sys.executable), should_stop)


def prepare_environment(runtime: RuntimeRecipe, lease: Lease, compiled: Path) -> None:
    """Threads, visible devices and the compilers' folder for torch, which reads them when it is imported.

    A compiler's cache is executed as code: it belongs in the workspace, not in a shared /tmp.
    """
    assert "torch" not in sys.modules, "torch was imported before the lease"
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(runtime.threads)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(lease) or ""
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


def disk_figures(directory: Path, phase: PhaseName | None) -> DiskFigures:
    """What the phase was expected to write, and the free bytes now."""
    needed = 0
    if phase is not None:
        request = read_record(directory).request
        needed = expected_disk(phase, request.recipe, request.inputs)
    return DiskFigures(needed, free_disk(directory), directory)


def memory_figures(directory: Path) -> MemoryFigures:
    """This process's peak memory, on the GPU if it used one, and what its plan expected."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    try:
        expected = read_record(directory).expected_memory_bytes
    except OpdError:
        expected = None  # the failure itself reports a run.json that cannot be read
    return MemoryFigures(peak, expected)
