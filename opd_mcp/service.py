"""The one face that the server and the command line call: every method answers soon, and raises only OpdError."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.models import ModelCache
from opd_mcp.planning.arms import arms_of, has_arms
from opd_mcp.planning.confirmation import Question, cache_question, deletion_question, plan_question
from opd_mcp.planning.costs.workload import Workload
from opd_mcp.planning.exports import export_question, export_request
from opd_mcp.planning.hub_models import HubModels
from opd_mcp.planning.phases import cache_id_of
from opd_mcp.planning.planner import PlanMemory, Planner, changed_parts, require_unblocked
from opd_mcp.planning.references import References
from opd_mcp.planning.run_requests import RequestBuilder
from opd_mcp.planning.start_arguments import (
    Labelled,
    labels_of,
    plan_arguments,
    require_cache_arguments,
    require_nothing_but_plan,
)
from opd_mcp.schemas.answers import (
    ArtifactList,
    DashboardFeed,
    DeletedArtifact,
    DeletedRun,
    Limits,
    LogPage,
    MetricsReport,
    RunComparison,
    SetupReport,
    SweepStarted,
)
from opd_mcp.schemas.cache import CacheInspection
from opd_mcp.schemas.errors import ArgumentError, PlanError, RunError, UnknownIdError
from opd_mcp.schemas.next_action import next_call, plan_call
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import (
    AssessOverhead,
    BenchmarkStudent,
    BuildTeacherCache,
    CompareRuns,
    ExportStudent,
    GenerateTeacherResponses,
    GetRunLogs,
    GetRunMetrics,
    ListArtifacts,
    PlanDistillation,
    ReadDashboard,
    SampleModel,
    StartDistillation,
    StartSft,
    Sweep,
)
from opd_mcp.schemas.runs import (
    ACTIVE_STATES,
    DataInput,
    ModelInput,
    RunKind,
    RunLabels,
    RunList,
    RunRecord,
    RunRequest,
    RunSnapshot,
    RunState,
    RunStatus,
)
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.logs import log_page
from opd_mcp.store.roots import AllowedRoots, ExportRoots
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import LOG_FILE, request_cancel, run_directory
from opd_mcp.store.store import StartedRun, Store
from opd_mcp.store.workspace import Workspace, export_folders, hub_owners, read_arguments, read_plan, save_plan
from opd_mcp.supervisor.launch import Supervisor
from opd_mcp.supervisor.sweeps import Settings, Sweeps, require_different, swept_settings
from opd_mcp.views.artifacts import artifact_list, delete_artifact
from opd_mcp.views.cache import inspect_cache
from opd_mcp.views.compare import chosen_runs, compared
from opd_mcp.views.dashboard import dashboard_feed, dashboard_page
from opd_mcp.views.deletion import delete_run, run_deletion
from opd_mcp.views.metrics import metrics_report
from opd_mcp.views.resources import export_card, report_page
from opd_mcp.views.setup import setup_report
from opd_mcp.views.status import snapshot_of, status_of, wait_token_of

LATEST = "latest"
Arguments = TypeVar("Arguments", bound=Labelled)


class JobService:
    """Plans, starts, follows and stops runs of one workspace; safe to call from several threads."""

    def __init__(self, workspace: Workspace, roots: AllowedRoots, settings: JobSettings | None = None) -> None:
        self.settings = settings or JobSettings()
        self.workspace = workspace
        exports = [*self.settings.export_roots, *export_folders(workspace)]
        self.exports = ExportRoots(exports, workspace.root, [*self.settings.hub_owners, *hub_owners(workspace)])
        self.roots = AllowedRoots([workspace.root, *roots.roots, self.settings.examples, *self.exports.roots])
        self.store = Store(workspace)
        self.leases = LeaseFolder(self.settings.lease_folder, self.settings.cpu_slots)
        models = ModelCache()
        hub = HubModels(self.settings.hub)
        self._references = References(self.store, self.roots, models, self.settings.teacher_hosts, hub=hub)
        self._builder = RequestBuilder(self._references, self.store.artifacts)
        self._supervisor = Supervisor(self.store, self.leases, self.settings, models)
        self._sweeps = Sweeps(self.store, self._supervisor)
        self._planner = Planner(self._references, self._builder, self._supervisor.target)
        self._plans = PlanMemory()
        self._views = self.store.views
        self._planning = threading.Lock()

    def setup(self) -> SetupReport:
        """The machine, the workspace, the limits and the embedded example."""
        self.store.look_around()
        return setup_report(
            self.store, self.roots, self.exports, self.leases, self.settings, self._supervisor.executors()
        )

    def plan(self, arguments: PlanDistillation) -> Plan:
        """What a distillation would do, what it costs and what stands in its way; saved under its `plan_id`.

        Raises OpdError for inputs that cannot be used at all: paths, data, overrides, tokenizers that differ.
        """
        self.store.look_around()
        with self._planning:
            plan = self._planner.plan(arguments)
            self._plans.keep(arguments, plan)
        save_plan(self.workspace, plan, arguments)
        return plan

    def workload(self, plan: Plan) -> Workload | None:
        """The work of a plan's phases; None while one of its models is still to be fetched."""
        return self._planner.workload(plan)

    def paths_behind(self, plan_id: str | None, cache_id: str | None) -> list[str]:
        """The files and folders that a saved plan, or the run that made a cache, was given; raises `unknown_plan`."""
        inputs = read_plan(self.workspace, plan_id).inputs if plan_id else None
        if inputs is None and cache_id is not None:
            run_id = self.store.run_of(cache_id)
            known = self.store.exists(run_id)
            inputs = (
                self.store.record(run_id).request.inputs if known else self._references.inputs_of_artifact(cache_id)
            )
        if inputs is None:
            return []
        sources = [value for _, value in inputs if isinstance(value, ModelInput | DataInput)]
        return [source.path for source in sources if source.path is not None]

    def start_distillation(self, arguments: StartDistillation) -> RunSnapshot:
        """The run of a plan, of a plan's arguments, or of a student and a teacher cache.

        Raises PlanError `plan_blocked` or `plan_changed`, ConsistencyError, and what `plan` raises.
        """
        if arguments.cache_id is not None and arguments.plan_id is None:
            require_cache_arguments(arguments)
            return self._started(RequestBuilder.from_cache, arguments)
        plan = self._unchanged_plan(arguments) if arguments.plan_id else self._current_plan(plan_arguments(arguments))
        require_unblocked(plan)
        labels = labels_of(arguments)
        planned = read_arguments(self.workspace, plan) if arguments.plan_id else plan_arguments(arguments)
        if arguments.plan_id is not None and labels == RunLabels():
            labels = labels_of(planned)
        if has_arms(planned):
            return self._start_arms(planned, plan, labels, benchmark=arguments.benchmark)
        request = self._builder.on(planned.executor).from_plan(plan, benchmark=arguments.benchmark)
        return self._start(request, labels)

    def _start_arms(self, planned: PlanDistillation, plan: Plan, labels: RunLabels, *, benchmark: bool) -> RunSnapshot:
        """The runs of all arms and seeds of a plan, queued as a sweep's are; answered with the first of them."""
        arms = arms_of(planned, plan, self.workload(plan))
        with self._planning:
            plans = [plan if arm.arguments == planned else self._planner.plan(arm.arguments) for arm in arms]
        for own in plans:
            require_unblocked(own)
        builder = self._builder.on(planned.executor)
        requests = [builder.from_plan(own, benchmark=benchmark) for own in plans]
        started = self._sweeps.start(labels, [arm.settings for arm in arms], requests)
        first = started.runs[0]
        note = (
            f"{len(started.runs)} runs ({', '.join(dict.fromkeys(arm.name for arm in arms))}; {planned.seeds} seeds), "
            f"all with the tag {started.sweep_id}: compare_runs sets their quality and cost side by side."
        )
        note = " ".join([note, *(f"Not started: {why}" for why in started.not_started)])
        update = {"note": note, "reused": first.reused, "next_action": started.next_action}
        return self.snapshot(first.run_id).model_copy(update=update)

    def generate_teacher_responses(self, arguments: GenerateTeacherResponses) -> RunSnapshot:
        """The run in which the teacher answers the prompts."""
        return self._started(RequestBuilder.responses, arguments)

    def start_sft(self, arguments: StartSft) -> RunSnapshot:
        """The run that fine-tunes a student on responses."""
        return self._started(RequestBuilder.sft, arguments)

    def build_teacher_cache(self, arguments: BuildTeacherCache) -> RunSnapshot:
        """The run that draws the student's rollouts and scores them with the teacher; `cache_id` is known at once.

        Raises ConsistencyError `teacher_mismatch`, `lineage_missing` or `tokenizer_mismatch`.
        """
        return self._started(RequestBuilder.cache, arguments)

    def benchmark_student(self, arguments: BenchmarkStudent) -> RunSnapshot:
        """The run that measures a model and its baselines on prompts."""
        return self._started(RequestBuilder.benchmark, arguments)

    def sample_model(self, arguments: SampleModel) -> RunSnapshot:
        """The run in which a model answers a few prompts; its result holds the texts."""
        return self._started(RequestBuilder.sample, arguments)

    def assess_overhead(self, arguments: AssessOverhead) -> RunSnapshot:
        """The run that measures two models on this machine, and says what their distillation would cost."""
        return self._started(RequestBuilder.assess, arguments)

    def export_student(self, arguments: ExportStudent) -> RunSnapshot:
        """The run that writes a model with its card below an export root, or uploads it to the Hub."""
        return self._started(lambda builder, given: export_request(builder, self.exports, given), arguments)

    def export_question(self, arguments: ExportStudent) -> Question | None:
        """What the user must agree to before a model is uploaded; raises what `export_student` raises."""
        return export_question(self._builder, self.exports, arguments)

    def start_question(self, arguments: StartDistillation, gpu_hours: float) -> Question | None:
        """What the user must agree to before this start: a plan above so many hours, or a teacher mismatch."""
        if arguments.plan_id is not None:
            return plan_question(read_plan(self.workspace, arguments.plan_id), gpu_hours)
        if arguments.cache_id is not None:
            return cache_question(arguments.cache_id, arguments.allow_teacher_mismatch)
        return plan_question(self._current_plan(plan_arguments(arguments)), gpu_hours)

    def cache_question(self, arguments: BuildTeacherCache) -> Question | None:
        """What the user must agree to before this cache is built; raises what `build_teacher_cache` raises."""
        if not arguments.allow_teacher_mismatch:
            return None
        with self._planning:
            request = self._builder.on(arguments.executor).cache(arguments)
        return cache_question(str(cache_id_of(request.phases)), True)

    def deletion_question(self, artifact_id: str) -> Question:
        """What the user must agree to before an artifact is deleted; raises UnknownIdError `unknown_artifact`."""
        record = self.store.artifacts.get(artifact_id).record
        return deletion_question(artifact_id, record.kind, byte_size(record.bytes))

    def sweep(self, arguments: Sweep) -> SweepStarted:
        """The runs of a grid or list of settings on one cache, queued; those that an equal call started are found.

        Raises what `start_distillation` raises for a cache, and ArgumentError `invalid_argument` as `swept_settings`.
        """
        points, requests = self._swept(arguments)
        return self._sweeps.start(labels_of(arguments), points, requests)

    def sweep_question(self, arguments: Sweep, gpu_hours: float) -> Question | None:
        """What the user must agree to before a sweep: its runs together above so many hours, or a teacher mismatch."""
        return self._sweeps.question(arguments, self._swept(arguments)[1], gpu_hours)

    def _swept(self, arguments: Sweep) -> tuple[list[Settings], list[RunRequest]]:
        points = swept_settings(arguments)
        with self._planning:
            requests = self._builder.on(arguments.executor).sweep(arguments, points)
        require_different(points, requests)
        return points, requests

    def inspect_cache(self, reference: str) -> CacheInspection:
        """A teacher cache's manifest, figures and two rows; raises PathError `not_a_cache`, UnknownIdError."""
        return inspect_cache(self.cache_directory(reference), self._references.texts)

    def cache_directory(self, reference: str) -> Path:
        """Where a teacher cache is that an artifact id, a run id or a path means; raises as `inspect_cache`."""
        return Path(str(self._references.cache(reference).input.path))

    def status(self, run_id: str = LATEST) -> RunStatus:
        """Where a run stands; raises UnknownIdError `unknown_run` with the nearest ids."""
        self._supervisor.reap()
        run_id = self._existing(run_id)
        return self._views.read(run_id, self._status)

    def snapshot(self, run_id: str) -> RunSnapshot:
        """The run in the form in which its start was answered, with its result or error once it has ended."""
        return self._views.read(self._existing(run_id), snapshot_of)

    def list_runs(
        self,
        state: RunState | None = None,
        kind: RunKind | None = None,
        name: str | None = None,
        tag: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> RunList:
        """A page of runs, newest first; raises ArgumentError `invalid_argument` for a bad limit or cursor."""
        if not 1 <= limit <= Limits().list_limit:
            raise ArgumentError(
                "invalid_argument",
                f"limit is between 1 and {Limits().list_limit}.",
                value=limit,
                fix="Give a smaller limit and go on with next_cursor.",
            )
        self.store.look_around()
        return self.store.list_runs(state=state, kind=kind, name=name, tag=tag, limit=limit, cursor=cursor)

    def run_metrics(self, arguments: GetRunMetrics) -> MetricsReport:
        """Series, trend, diagnosis and differences of up to four runs, from their journals."""
        ids = dict.fromkeys(self._existing(run_id) for run_id in arguments.run_ids)
        runs = [(self.store.record(run_id), self.store.view(run_id, keep_series=True)) for run_id in ids]
        return metrics_report(runs, arguments.keys, arguments.max_points)

    def compare_runs(self, arguments: CompareRuns) -> RunComparison:
        """Runs next to each other: settings that differ, figures, cost, and paired differences, from reports alone.

        Raises ArgumentError `invalid_argument` unless run_ids or a tag is given, UnknownIdError `unknown_run`.
        """
        given = [found for run_id in arguments.run_ids for found in self.runs_of(run_id)]
        return compared(self.store, chosen_runs(self.store, given, arguments.tag))

    def run_logs(self, arguments: GetRunLogs) -> LogPage:
        """A page of a run's log, from its end."""
        run_id = self._existing(arguments.run_id)
        log = run_directory(self.workspace, run_id) / LOG_FILE
        return log_page(run_id, log, tail=arguments.tail, contains=arguments.contains, cursor=arguments.cursor)

    def dashboard(self, run_ids: Sequence[str] = ()) -> DashboardFeed:
        """Up to four runs in short, by default an active one, else the newest, and the newest runs as a list."""
        return dashboard_feed(self.store, [self._existing(run_id) for run_id in run_ids])

    def dashboard_page(self, arguments: ReadDashboard) -> DashboardFeed:
        """What the dashboard's page shows: up to eight runs in full, and a page of runs with their curves in small."""
        return dashboard_page(self.store, [self._existing(run_id) for run_id in arguments.run_ids], arguments)

    def run_document(self, run_id: str, kind: str) -> str:
        """The HTML `report` of a run, or the Markdown `card` of its export.

        Raises UnknownIdError `unknown_run`, or `unknown_artifact` where there is none; PathError for a card that is
        gone, or outside of the allowed roots.
        """
        run_id = self._existing(run_id)
        if kind == "report":
            return report_page(self.store, run_id)
        return self.roots.resolve(export_card(self.store, run_id)).read_text(encoding="utf-8")

    def list_artifacts(self, arguments: ListArtifacts) -> ArtifactList:
        """A page of artifacts, newest first."""
        self.store.look_around()
        return artifact_list(self.store, arguments.kind, arguments.limit, arguments.cursor)

    def delete_artifact(self, artifact_id: str) -> DeletedArtifact:
        """The space freed; raises UnknownIdError `unknown_artifact`, IntegrityError `artifact_needed`."""
        with self._planning:
            return delete_artifact(self.store, artifact_id)

    def run_deletion_question(self, run_id: str) -> Question:
        """What the user must agree to before a run is deleted; raises as `delete_run`."""
        return run_deletion(self.store, self.store.run_of(run_id)).question()

    def delete_run(self, run_id: str) -> DeletedRun:
        """What went with the run and what stays; raises UnknownIdError `unknown_run`, RunError `run_active`."""
        with self._planning:
            return delete_run(self.store, self.store.run_of(run_id))

    def cancel(self, run_id: str) -> RunSnapshot:
        """The run after a durable cancel request, or what stands for all active runs with a tag.

        Raises RunError `run_not_active` where there is none that is active, UnknownIdError `unknown_run`.
        """
        if not self.store.exists(run_id) and (tagged := self.store.index.runs(tag=run_id)):
            return self._cancel_all(run_id, [row.run_id for row in tagged if self.store.exists(row.run_id)])
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
        return self._requested(run_id)

    def _cancel_all(self, tag: str, run_ids: Sequence[str]) -> RunSnapshot:
        """Ask all active runs with a tag to stop, those that wait first, so that none begins meanwhile."""
        active = [run_id for run_id in run_ids if self._views.state(run_id) in ACTIVE_STATES]
        if not active:
            raise RunError(
                "run_not_active",
                "All runs with this tag have ended.",
                value=tag,
                fix="See how they ended.",
                call=next_call("list_runs", tag=tag),
            )
        snapshots = [self._requested(run_id) for run_id in active]  # the newest first: they are last in the queue
        return snapshots[-1].model_copy(
            update={
                "note": f"cancel requested for {len(active)} runs with the tag {tag}: {', '.join(active)}",
                "next_action": next_call("list_runs", "A cancellation is pending; look until all have ended.", tag=tag),
            }
        )

    def _requested(self, run_id: str) -> RunSnapshot:
        request_cancel(run_directory(self.workspace, run_id))
        return self._views.read(run_id, self._attended)

    def resume(self, run_id: str) -> RunSnapshot:
        """The failed, cancelled or lost run, queued again from its last checkpoint; `reused` while it is active.

        Raises RunError `run_not_active` for a run that has succeeded, `same_request_active`, `run_locked`; and
        ResourceError as a start does, for what the phases that are left need.
        """
        return self._answer(self._supervisor.resume(self._existing(run_id)))

    def wait_token(self, run_id: str) -> str:
        """A short text that changes when the run's state, phase or alerts do; cheap to poll."""
        return self._views.read(self._existing(run_id), lambda view, record: wait_token_of(view))

    def _attended(self, view: RunView, record: RunRecord) -> RunSnapshot:
        self._supervisor.attend(view)
        return snapshot_of(view, record)

    def _status(self, view: RunView, record: RunRecord) -> RunStatus:
        self._supervisor.attend(view)
        place = self._supervisor.place(view) if view.state == "queued" else None
        return status_of(view, record, place)

    def _started(self, build: Callable[[RequestBuilder, Arguments], RunRequest], arguments: Arguments) -> RunSnapshot:
        self.store.look_around()
        with self._planning:
            request = build(self._builder.on(getattr(arguments, "executor", None)), arguments)
        return self._start(request, labels_of(arguments))

    def _start(self, request: RunRequest, labels: RunLabels) -> RunSnapshot:
        started = self._supervisor.start(request.model_copy(update={"labels": labels}))
        return self._answer(started, labels)

    def _answer(self, started: StartedRun, wanted: RunLabels | None = None) -> RunSnapshot:
        def answer(view: RunView, record: RunRecord) -> RunSnapshot:
            return snapshot_of(view, record, reused=started.reused, wanted=wanted)

        return self._views.read(started.run_id, answer)

    def _current_plan(self, arguments: PlanDistillation) -> Plan:
        """The plan for the arguments, the one that was made last where all that it read is as it was."""
        return self._plans.unblocked(arguments) or self.plan(arguments)

    def _unchanged_plan(self, arguments: StartDistillation) -> Plan:
        require_nothing_but_plan(arguments)
        saved = read_plan(self.workspace, str(arguments.plan_id))
        planned = read_arguments(self.workspace, saved)
        now = self._current_plan(planned)
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

    def runs_of(self, name: str) -> list[str]:
        """The run that an id or a name means, or, oldest first, all runs with a tag, such as a sweep's id.

        Raises UnknownIdError `unknown_run` where several runs have the name.
        """
        tagged = [] if self.store.exists(name) or self.store.run_named(name) else self.store.tagged(name)
        return tagged or [self._existing(name)]

    def _existing(self, run_id: str) -> str:
        if run_id != LATEST:
            return self.store.run_of(run_id)
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
