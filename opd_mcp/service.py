"""The jobs layer's face: every method is synchronous, answers in under two seconds and raises only OpdError."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opd_mcp.devices.hardware import Target, target_of
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.models import ModelCache
from opd_mcp.planning.confirmation import Question, cache_question, deletion_question, plan_question
from opd_mcp.planning.memory import require_memory, with_claims
from opd_mcp.planning.phases import cache_id_of
from opd_mcp.planning.planner import Planner, changed_parts
from opd_mcp.planning.quotas import admission
from opd_mcp.planning.references import References
from opd_mcp.planning.run_records import expected_cost, new_record
from opd_mcp.planning.run_requests import Composer
from opd_mcp.schemas.answers import (
    ArtifactList,
    DashboardFeed,
    DeletedArtifact,
    Limits,
    LogPage,
    MetricsReport,
    SetupReport,
)
from opd_mcp.schemas.cache import CacheInspection
from opd_mcp.schemas.errors import ArgumentError, PlanError, RunError, UnknownIdError
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.next_action import next_call, plan_call
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.schemas.requests import (
    BenchmarkStudent,
    BuildTeacherCache,
    GenerateTeacherResponses,
    GetRunLogs,
    GetRunMetrics,
    ListArtifacts,
    PlanDistillation,
    SampleModel,
    StartDistillation,
    StartSft,
)
from opd_mcp.schemas.runs import (
    ACTIVE_STATES,
    RunKind,
    RunList,
    RunRecord,
    RunRequest,
    RunSnapshot,
    RunState,
    RunStatus,
)
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.logs import log_page
from opd_mcp.store.plans import read_arguments, read_plan, save_plan
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import LOG_FILE, request_cancel, run_directory
from opd_mcp.store.store import StartedRun, Store
from opd_mcp.store.worker_process import has_begun
from opd_mcp.store.workspace import Workspace
from opd_mcp.supervisor.launch import Children, launch_worker
from opd_mcp.supervisor.starts import require_room, with_phases_left
from opd_mcp.views.artifacts import artifact_list, delete_artifact
from opd_mcp.views.cache import inspect_cache
from opd_mcp.views.dashboard import dashboard_feed
from opd_mcp.views.metrics import metrics_report
from opd_mcp.views.run_views import RunViews
from opd_mcp.views.setup import setup_report
from opd_mcp.views.status import snapshot_of, status_of, wait_token_of

LATEST = "latest"
TAKEN_UP_SECONDS = 15.0
TAKEN_UP_POLL_SECONDS = 0.05
PLAN_ONLY = {"plan_id", "benchmark", "confirm"}


class JobService:
    """Plans, starts, follows and stops runs of one workspace; safe to call from several threads."""

    def __init__(self, workspace: Workspace, roots: AllowedRoots, settings: JobSettings | None = None) -> None:
        self.settings = settings or JobSettings()
        self.workspace = workspace
        self.roots = AllowedRoots([workspace.root, *roots.roots, self.settings.examples])
        self.store = Store(workspace)
        self.leases = LeaseFolder(self.settings.lease_folder, self.settings.cpu_slots)
        self._models = ModelCache()
        self._references = References(self.store, self.roots, self._models, self.settings.teacher_hosts)
        self._planner = Planner(self._references, self._find_artifact, self._target)
        self._composer = Composer(self._references, self._find_artifact)
        self._views = RunViews(workspace)
        self._starting = threading.Lock()
        self._children = Children()

    def setup(self) -> SetupReport:
        """The machine, the workspace, the limits and the embedded example."""
        return setup_report(self.store, self.roots, self.leases, self.settings)

    def plan(self, arguments: PlanDistillation) -> Plan:
        """What a distillation would do, what it costs and what stands in its way; saved under its `plan_id`.

        Raises OpdError for inputs that cannot be used at all: paths, data, overrides, tokenizers that differ.
        """
        with self._starting:
            plan = self._planner.plan(arguments)
        save_plan(self.workspace, plan, arguments)
        return plan

    def start_distillation(self, arguments: StartDistillation) -> RunSnapshot:
        """The run of a plan, of a plan's arguments, or of a student and a teacher cache.

        Raises PlanError `plan_blocked` or `plan_changed`, ConsistencyError, and what `plan` raises.
        """
        if arguments.plan_id is not None:
            plan = self._unchanged_plan(arguments)
        elif arguments.cache_id is not None:
            require_cache_arguments(arguments)
            with self._starting:
                request = self._composer.from_cache(arguments)
            return self._start(request)
        else:
            plan = self.plan(plan_arguments(arguments))
        require_unblocked(plan)
        return self._start(self._composer.from_plan(plan, benchmark=arguments.benchmark))

    def generate_teacher_responses(self, arguments: GenerateTeacherResponses) -> RunSnapshot:
        """The run in which the teacher answers the prompts."""
        with self._starting:
            request = self._composer.responses(arguments)
        return self._start(request)

    def start_sft(self, arguments: StartSft) -> RunSnapshot:
        """The run that fine-tunes a student on responses."""
        with self._starting:
            request = self._composer.sft(arguments)
        return self._start(request)

    def build_teacher_cache(self, arguments: BuildTeacherCache) -> RunSnapshot:
        """The run that draws the student's rollouts and scores them with the teacher; `cache_id` is known at once.

        Raises ConsistencyError `teacher_mismatch`, `lineage_missing` or `tokenizer_mismatch`.
        """
        with self._starting:
            request = self._composer.cache(arguments)
        return self._start(request)

    def benchmark_student(self, arguments: BenchmarkStudent) -> RunSnapshot:
        """The run that measures a model and its baselines on prompts."""
        with self._starting:
            request = self._composer.benchmark(arguments)
        return self._start(request)

    def sample_model(self, arguments: SampleModel) -> RunSnapshot:
        """The run in which a model answers a few prompts; its result holds the texts."""
        with self._starting:
            request = self._composer.sample(arguments)
        return self._start(request)

    def start_question(self, arguments: StartDistillation, gpu_hours: float) -> Question | None:
        """What the user must agree to before this start: a plan above so many hours, or a teacher mismatch."""
        if arguments.plan_id is not None:
            return plan_question(read_plan(self.workspace, arguments.plan_id), gpu_hours)
        if arguments.cache_id is not None:
            return cache_question(arguments.cache_id, arguments.allow_teacher_mismatch)
        return plan_question(self.plan(plan_arguments(arguments)), gpu_hours)

    def cache_question(self, arguments: BuildTeacherCache) -> Question | None:
        """What the user must agree to before this cache is built; raises what `build_teacher_cache` raises."""
        if not arguments.allow_teacher_mismatch:
            return None
        with self._starting:
            request = self._composer.cache(arguments)
        return cache_question(str(cache_id_of(request.phases)), True)

    def deletion_question(self, artifact_id: str) -> Question:
        """What the user must agree to before an artifact is deleted; raises UnknownIdError `unknown_artifact`."""
        record = self.store.artifacts.get(artifact_id).record
        return deletion_question(artifact_id, record.kind, byte_size(record.bytes))

    def inspect_cache(self, reference: str) -> CacheInspection:
        """A teacher cache's manifest, figures and two rows; raises PathError `not_a_cache`, UnknownIdError."""
        return inspect_cache(self.cache_directory(reference))

    def cache_directory(self, reference: str) -> Path:
        """Where a teacher cache is that an artifact id, a run id or a path means; raises as `inspect_cache`."""
        return Path(str(self._references.cache(reference).input.path))

    def status(self, run_id: str = LATEST) -> RunStatus:
        """Where a run stands; raises UnknownIdError `unknown_run` with the nearest ids."""
        self._children.reap()
        run_id = self._existing(run_id)
        return self._views.read(run_id, self._status)

    def snapshot(self, run_id: str) -> RunSnapshot:
        """The run in the form in which its start was answered, with its result or error once it has ended."""
        return self._views.read(self._existing(run_id), snapshot_of)

    def list_runs(
        self, state: RunState | None = None, kind: RunKind | None = None, limit: int = 20, cursor: str | None = None
    ) -> RunList:
        """A page of runs, newest first; raises ArgumentError `invalid_argument` for a bad limit or cursor."""
        if not 1 <= limit <= Limits().list_limit:
            raise ArgumentError(
                "invalid_argument",
                f"limit is between 1 and {Limits().list_limit}.",
                value=limit,
                fix="Give a smaller limit and go on with next_cursor.",
            )
        return self.store.list_runs(state=state, kind=kind, limit=limit, cursor=cursor)

    def run_metrics(self, arguments: GetRunMetrics) -> MetricsReport:
        """Series, trend, diagnosis and differences of up to four runs, from their journals."""
        ids = dict.fromkeys(self._existing(run_id) for run_id in arguments.run_ids)
        runs = [(self.store.record(run_id), self.store.view(run_id)) for run_id in ids]
        return metrics_report(runs, arguments.keys, arguments.max_points)

    def run_logs(self, arguments: GetRunLogs) -> LogPage:
        """A page of a run's log, from its end."""
        run_id = self._existing(arguments.run_id)
        log = run_directory(self.workspace, run_id) / LOG_FILE
        return log_page(run_id, log, tail=arguments.tail, contains=arguments.contains, cursor=arguments.cursor)

    def dashboard(self, run_ids: Sequence[str] = ()) -> DashboardFeed:
        """What the dashboard shows of up to four runs, the newest one by default."""
        return dashboard_feed(self.store, [self._existing(run_id) for run_id in run_ids])

    def list_artifacts(self, arguments: ListArtifacts) -> ArtifactList:
        """A page of artifacts, newest first."""
        return artifact_list(self.store, arguments.kind, arguments.limit, arguments.cursor)

    def delete_artifact(self, artifact_id: str) -> DeletedArtifact:
        """The space freed; raises UnknownIdError `unknown_artifact`, IntegrityError `artifact_needed`."""
        with self._starting:
            return delete_artifact(self.store, artifact_id)

    def cancel(self, run_id: str) -> RunSnapshot:
        """The run after a durable cancel request; raises RunError `run_not_active` for a run that has ended."""
        run_id = self._existing(run_id)
        before = self._views.read(run_id, lambda view, record: view.state)
        if before not in ACTIVE_STATES:
            raise RunError(
                "run_not_active",
                f"The run has ended: {before}.",
                value=run_id,
                fix="See which runs are active.",
                call=next_call("list_runs", state="running"),
            )
        request_cancel(run_directory(self.workspace, run_id))
        return self._views.read(run_id, snapshot_of)

    def resume(self, run_id: str) -> RunSnapshot:
        """The failed, cancelled or lost run, queued again from its last checkpoint; `reused` while it is active.

        Raises RunError `run_not_active` for a run that has succeeded, `same_request_active`, `run_locked`; and
        ResourceError as a start does, for what the phases that are left need.
        """
        self._children.reap()
        run_id = self._existing(run_id)
        if self.store.view(run_id).state not in {"failed", "cancelled", "lost"}:
            return self._launched(lambda: self.store.resume(run_id, lambda record: admission(self.store, record)()))
        with self._starting:
            record = with_phases_left(self.store.record(run_id), self._find_artifact)
            target = self._target(record.request.recipe.runtime)
            estimate = expected_cost(record.request, self.workspace, self._models, target)
            require_room(record, estimate, target, self.workspace)
        admit = admission(self.store, record)
        return self._launched(lambda: self.store.resume(run_id, lambda _: admit()))

    def wait_token(self, run_id: str) -> str:
        """A short text that changes when the run's state, phase or number of alerts does; cheap to poll."""
        return self._views.read(self._existing(run_id), lambda view, record: wait_token_of(view))

    def _target(self, runtime: RuntimeRecipe) -> Target:
        return with_claims(target_of(runtime, self.leases.busy), self.store, self.settings.cpu_slots)

    def _status(self, view: RunView, record: RunRecord) -> RunStatus:
        if view.state == "lost":
            self._children.settle(view.directory)
        place = self.leases.place(record.run_id) if view.state == "queued" else None
        return status_of(view, record, place)

    def _start(self, request: RunRequest) -> RunSnapshot:
        self._children.reap()
        with self._starting:
            target = self._target(request.recipe.runtime)
            record = new_record(request, self.workspace, self._models, target)
        if not self.store.is_active(record.request_hash):
            require_memory(record, target)
        return self._launched(lambda: self.store.start_once(record, admission(self.store, record)))

    def _launched(self, begin: Callable[[], StartedRun]) -> RunSnapshot:
        started = begin()
        deadline = time.monotonic() + TAKEN_UP_SECONDS
        # Whoever began it may yet die before its worker lives, and what is acknowledged here must not be lost with it.
        while started.reused and not has_begun(self.store.view(started.run_id)):
            if time.monotonic() > deadline:
                raise RunError(
                    "run_starting",
                    "Another call is starting this run, and its worker does not live yet.",
                    value=started.run_id,
                    fix="Make the same call again in a moment.",
                )
            time.sleep(TAKEN_UP_POLL_SECONDS)
            started = begin()
        if started.lock is not None:
            worker = launch_worker(self.workspace, started.lock, self.settings)
            self._children.add(started.lock.directory, started.attempt, worker)
        return self._views.read(started.run_id, lambda view, record: snapshot_of(view, record, reused=started.reused))

    def _unchanged_plan(self, arguments: StartDistillation) -> Plan:
        require_nothing_but_plan(arguments)
        saved = read_plan(self.workspace, str(arguments.plan_id))
        planned = read_arguments(self.workspace, saved)
        now = self.plan(planned)
        if now.plan_id == saved.plan_id:
            return now
        changed = changed_parts(planned, saved, now)
        raise PlanError(
            "plan_changed",
            f"What was planned is no longer there as it was; changed: {', '.join(changed)}.",
            value=saved.plan_id,
            fix="Look at the new plan, then start it.",
            call=next_call("start_distillation", plan_id=now.plan_id),
        )

    def _existing(self, run_id: str) -> str:
        if run_id != LATEST:
            return run_id
        latest = self.store.latest_run()
        if latest is None:
            raise UnknownIdError(
                "unknown_run",
                "There is no run in this workspace yet.",
                value=run_id,
                fix="Plan a distillation and start it.",
                call=plan_call(),
            )
        return latest

    def _find_artifact(self, kind: ArtifactKind, key: str) -> str | None:
        found = self.store.artifacts.find_by_key(kind, key)
        return found.artifact_id if found else None


def plan_arguments(arguments: StartDistillation) -> PlanDistillation:
    """The plan's arguments in those of a start; raises ArgumentError `invalid_argument` naming what is missing."""
    missing = [name for name in ("student", "teacher", "prompts") if getattr(arguments, name) is None]
    if missing:
        raise ArgumentError(
            "invalid_argument",
            f"Missing: {', '.join(missing)}.",
            fix="Give plan_id, or student + teacher + prompts, or student + cache_id.",
        )
    values = {name: getattr(arguments, name) for name in PlanDistillation.model_fields}
    return PlanDistillation(**values)


def require_cache_arguments(arguments: StartDistillation) -> None:
    """Raise ArgumentError `invalid_argument` for a start from a cache without a student, or with what is of no use."""
    if arguments.student is None:
        raise ArgumentError("invalid_argument", "cache_id needs a student.", fix="Give the cache's student as well.")
    if arguments.sft_prompts is not None:
        raise ArgumentError(
            "invalid_argument",
            "sft_prompts have no use with cache_id: the cache's student has had its SFT.",
            fix="Leave out sft_prompts.",
        )


def require_nothing_but_plan(arguments: StartDistillation) -> None:
    """Raise ArgumentError `invalid_argument` for arguments next to plan_id that would change the plan."""
    fields = type(arguments).model_fields
    given = [
        name
        for name in arguments.model_fields_set - PLAN_ONLY
        if getattr(arguments, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        raise ArgumentError(
            "invalid_argument",
            f"A plan_id stands for all its arguments; given next to it: {', '.join(sorted(given))}.",
            fix="Give plan_id alone (and benchmark), or leave plan_id out.",
        )


def require_unblocked(plan: Plan) -> None:
    """Raise PlanError `plan_blocked` with what blocks a plan."""
    if plan.blocking:
        raise PlanError(
            "plan_blocked",
            " ".join(f"[{finding.code}] {finding.message}" for finding in plan.blocking),
            value=plan.plan_id,
            fix=" ".join(finding.fix for finding in plan.blocking),
            call=next((finding.call for finding in plan.blocking if finding.call), None),
        )
