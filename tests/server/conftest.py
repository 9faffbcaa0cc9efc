"""A scripted JobService, and real SDK clients connected to the real server over it, in both protocol eras."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from opd_mcp.planning.confirmation import Question
from opd_mcp.schemas.answers import (
    ArtifactList,
    ArtifactRow,
    ComparedRun,
    DashboardFeed,
    DashboardRun,
    DeletedArtifact,
    DeletedRun,
    Device,
    ExamplePaths,
    LogPage,
    MetricSeries,
    MetricsReport,
    PairedRuns,
    RunComparison,
    RunMetrics,
    SetupReport,
    ShownPhase,
    SweepStarted,
    SweptRun,
)
from opd_mcp.schemas.cache import CacheInspection, CacheManifest, RolloutStatistics, SampleRow, ScoreStatistics
from opd_mcp.schemas.errors import UnknownIdError
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.plans import ConsistencyVerdict, Finding, MethodEstimate, PhaseEstimate, Plan, PlannedPhase
from opd_mcp.schemas.recipes import Sampling
from opd_mcp.schemas.reports import Curve
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import (
    MetricTrend,
    ModelInput,
    Progress,
    RunInputs,
    RunList,
    RunPhase,
    RunRecord,
    RunRequest,
    RunRow,
    RunSnapshot,
    RunStatus,
)
from opd_mcp.server.app import build_server
from opd_mcp.service import JobService
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import JOURNAL_FILE, LOG_FILE
from opd_mcp.store.workspace import Workspace

IDENTITY = ModelIdentity(name="teacher", weights="a" * 64, tokenizer="b" * 64, special_tokens="c" * 64)


class ScriptedService:
    """Answers like a JobService; a test sets `run`, `token` and `fails` and reads `calls`."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        self.calls: list[tuple[str, Any]] = []
        self.token = "running/distill/0"
        self.fails: Exception | None = None
        self.question: Question | None = None
        self.threads: set[str] = set()
        self.run = RunStatus(
            run_id="lightning-arithmetic-7f3a",
            kind="distill",
            state="running",
            created_at="2026-08-01T10:00:00.000Z",
            updated_at="2026-08-01T10:01:40.000Z",
            phase="distill",
            phases_done=["sft", "rollout", "score"],
            phases_total=5,
            progress=Progress(done=120, total=400, unit="steps", eta_s=35.2, rate=8.0),
            eta_s=41.0,
            elapsed_s=100.5,
            metrics={"reverse_kl": MetricTrend(last=0.3125, trend="down"), "loss": MetricTrend(last=float("nan"))},
            next_check_s=10.0,
            next_action=next_call("get_run_status", "The run is running.", wait_seconds=25),
        )

    def _record(self, name: str, arguments: Any) -> None:
        self.calls.append((name, arguments))
        self.threads.add(threading.current_thread().name)
        if self.fails is not None:
            raise self.fails

    def _snapshot(self, name: str, kind: Any, arguments: Any) -> RunSnapshot:
        self._record(name, arguments)
        return RunSnapshot(
            run_id=self.run.run_id, kind=kind, state="queued", next_action=next_call("get_run_status", "Follow it.")
        )

    def setup(self) -> SetupReport:
        self._record("setup", None)
        paths = {name: f"/opt/examples/arithmetic/{name}" for name in ExamplePaths.model_fields}
        return SetupReport(
            version="0.1.0",
            python="3.11.9",
            devices=[
                Device(kind="cpu", name="2 cores", total_memory_bytes=8 << 30, free_memory_bytes=4 << 30, slots=2)
            ],
            free_disk_bytes=100 << 30,
            workspace="/home/user/.local/share/opd-mcp",
            allowed_roots=["/home/user/.local/share/opd-mcp", "/data"],
            example=ExamplePaths(**paths),
            next_action=next_call("plan_distillation", "Plan the example."),
        )

    def plan(self, arguments: Any) -> Plan:
        self._record("plan", arguments)
        teacher = IDENTITY
        phase = PhaseEstimate(phase="distill", flops=1e12, seconds=float("nan"), basis="no earlier run")
        estimates = [
            MethodEstimate(
                method=method,
                flops=1e12,
                seconds=60,
                peak_memory_bytes=1 << 30,
                disk_bytes=1 << 20,
                memory_basis="weights, gradients, optimizer, activations",
                disk_basis="bytes a token",
                phases=[phase],
            )
            for method in ("lightning", "live")
        ]
        return Plan(
            plan_id="plan-1",
            method="lightning",
            inputs=RunInputs(),
            recipe=resolve_recipe("demo", {}),
            phases=[PlannedPhase(name="sft", key="k1", satisfied_by="model-1"), PlannedPhase(name="distill", key="k2")],
            consistency=ConsistencyVerdict(status="consistent", basis="by_construction", teacher=teacher),
            estimates=estimates,
            warnings=[Finding(code="few_prompts", message="Only 3 prompts.", fix="Give more.")],
            next_action=next_call("start_distillation", plan_id="plan-1"),
        )

    def generate_teacher_responses(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("generate_teacher_responses", "generate", arguments)

    def start_sft(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("start_sft", "sft", arguments)

    def build_teacher_cache(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("build_teacher_cache", "cache", arguments).model_copy(update={"cache_id": "cache-1"})

    def start_distillation(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("start_distillation", "distill", arguments)

    def assess_overhead(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("assess_overhead", "assess", arguments)

    def benchmark_student(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("benchmark_student", "benchmark", arguments)

    def inspect_cache(self, reference: str) -> CacheInspection:
        self._record("inspect_cache", reference)
        manifest = CacheManifest(
            teacher=IDENTITY,
            behaviour=IDENTITY,
            prompts_sha256="0" * 64,
            sampling=Sampling(),
            seed=0,
            eos_token_ids=[1],
            topk=0,
            dtype="float32",
            vocab_size=24,
            shards=[],
            rollouts=RolloutStatistics(
                rows=1,
                response_tokens=2,
                mean_response_tokens=2.0,
                truncated_fraction=0.0,
                eos_fraction=1.0,
                empty_responses=0,
                duplicate_rows=0,
            ),
            scores=ScoreStatistics(mean_teacher_logprob=-1.0),
        )
        tokens = [("2", -0.5, -0.25), (" ", -0.1)]
        row = SampleRow(prompt="1+1=?", response="2 ", finish_reason="eos", response_tokens=2, tokens=tokens)
        return CacheInspection(path="/c", bytes=9, rows=1, tokens=2, manifest=manifest, shards=1, sample=[row])

    def status(self, run_id: str) -> RunStatus:
        self._record("status", run_id)
        if run_id not in ("latest", self.run.run_id):
            raise UnknownIdError(
                "unknown_run",
                "There is no such run.",
                value=run_id,
                nearest=[self.run.run_id],
                fix="List them.",
                call=next_call("list_runs"),
            )
        return self.run

    def snapshot(self, run_id: str) -> RunSnapshot:
        shared = {name: getattr(self.run, name) for name in RunSnapshot.model_fields if name in RunStatus.model_fields}
        return RunSnapshot(**shared)

    def wait_token(self, run_id: str) -> str:
        return self.token

    def list_runs(self, **filters: Any) -> RunList:
        self._record("list_runs", filters)
        row = RunRow(
            run_id=self.run.run_id, kind="distill", state="running", created_at="2026-08-01T10:00:00Z", student="s"
        )
        return RunList(rows=[row], total=1)

    def sample_model(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("sample_model", "sample", arguments)

    def export_student(self, arguments: Any) -> RunSnapshot:
        return self._snapshot("export_student", "export", arguments)

    def run_metrics(self, arguments: Any) -> MetricsReport:
        self._record("run_metrics", arguments)
        series = MetricSeries(
            key="distill.loss", steps=[1, 3], values=[1.0, 0.25], points=3, last=float("nan"), low=0.25
        )
        run = RunMetrics(
            run_id=self.run.run_id, kind="distill", state="running", series=[series], diagnosis="It falls."
        )
        return MetricsReport(runs=[run], differences={"distill.steps": [3, 4]})

    def compare_runs(self, arguments: Any) -> RunComparison:
        self._record("compare_runs", arguments)
        runs = [
            ComparedRun(
                run_id=f"run-{number}",
                name=f"steps={number}",
                kind="distill",
                state="succeeded",
                settings={"distill.steps": number},
                model="distilled",
                accuracy=(0.5 + number / 10, 0.4, 0.9),
                seconds=12.5,
            )
            for number in (1, 2)
        ]
        pair = PairedRuns(candidate="run-2", baseline="run-1", accuracy_difference=(0.1, -0.1, 0.3), prompts=50)
        return RunComparison(
            settings=["distill.steps"],
            runs=runs,
            best="run-2",
            paired=[pair],
            basis={"accuracy": "50 samples; greedy"},
            next_action=next_call("benchmark_student", "Measure it.", missing=["prompts"], model="run-2"),
        )

    def sweep(self, arguments: Any) -> SweepStarted:
        self._record("sweep", arguments)
        run = SweptRun(run_id="run-1", name="steps=1", state="queued", settings={"distill.steps": 1})
        action = next_call("get_run_status", "They queue.", run_id="run-1", wait_seconds=25)
        return SweepStarted(sweep_id="sweep-1", runs=[run], expected_seconds=60.0, next_action=action)

    def sweep_question(self, arguments: Any, gpu_hours: float) -> Question | None:
        return self.question

    def export_question(self, arguments: Any) -> Question | None:
        return self.question

    def run_deletion_question(self, run_id: str) -> Question:
        return Question(run_id, f"Delete {run_id} with model-1?")

    def delete_run(self, run_id: str) -> DeletedRun:
        self._record("delete_run", run_id)
        return DeletedRun(
            run_id=run_id,
            freed_bytes=1 << 20,
            artifacts=["model-1"],
            next_action=next_call("list_runs", "See the rest."),
        )

    def run_logs(self, arguments: Any) -> LogPage:
        self._record("run_logs", arguments)
        return LogPage(run_id=self.run.run_id, lines=["-- sft", "done"], next_cursor="12")

    def list_artifacts(self, arguments: Any) -> ArtifactList:
        self._record("list_artifacts", arguments)
        row = ArtifactRow(
            artifact_id="model-1", kind="model", path="/w/artifacts/model/model-1", bytes=1 << 20, created_at="2026"
        )
        return ArtifactList(rows=[row], total=1)

    def delete_artifact(self, artifact_id: str) -> DeletedArtifact:
        self._record("delete_artifact", artifact_id)
        return DeletedArtifact(
            artifact_id=artifact_id, freed_bytes=1 << 20, next_action=next_call("list_artifacts", "See the rest.")
        )

    def dashboard(self, run_ids: Any = ()) -> DashboardFeed:
        self._record("dashboard", run_ids)
        run = DashboardRun(
            run_id=self.run.run_id,
            kind="distill",
            state="running",
            created_at="2026-08-01T10:00:00Z",
            models="student ← teacher",
            phases=[ShownPhase(name="sft", state="done"), ShownPhase(name="distill", state="running")],
            progress=self.run.progress,
            curves=[Curve(key="distill.loss", steps=[1, 2, 3], values=[1.0, 0.5, 0.25])],
            scores={"distilled": {"greedy_accuracy": [0.8, 0.7, 0.9]}},
        )
        return DashboardFeed(runs=[run], listed=self.list_runs().rows)

    def dashboard_page(self, arguments: Any) -> DashboardFeed:
        self._record("dashboard_page", arguments)
        return self.dashboard(arguments.run_ids)

    def start_question(self, arguments: Any, gpu_hours: float) -> Question | None:
        return self.question

    def cache_question(self, arguments: Any) -> Question | None:
        return self.question

    def deletion_question(self, artifact_id: str) -> Question:
        return Question(artifact_id, f"Delete {artifact_id}?")

    def cancel(self, run_id: str) -> RunSnapshot:
        return self._snapshot("cancel", "distill", run_id)

    def resume(self, run_id: str) -> RunSnapshot:
        return self._snapshot("resume", "distill", run_id)


@pytest.fixture
def service(tmp_path: Path) -> ScriptedService:
    return ScriptedService(tmp_path / "scripted")


Connect = Callable[[], AbstractAsyncContextManager[Client]]


@pytest.fixture(params=["auto", "legacy"])
def connect(request: pytest.FixtureRequest, service: ScriptedService) -> Connect:
    """Opens a client of either protocol era, connected in memory to the real server over the scripted service."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Client]:
        async with Client(build_server(service), mode=request.param) as client:
            yield client

    return opened


@pytest.fixture
def jobs(tmp_path: Path) -> JobService:
    """A real service over an empty workspace."""
    return JobService(Workspace(tmp_path), AllowedRoots([]))


@pytest.fixture
def run(jobs):
    """An active run without a worker; answers its id and its journal."""
    inputs = RunInputs(student=ModelInput(reference="/m/student", path="/m/student"))
    request = RunRequest(
        kind="sft", recipe=resolve_recipe("demo", {}), inputs=inputs, phases=[RunPhase(name="sft", key="k")]
    )
    record = RunRecord(
        run_id="sft-student-1", created_at="2026-08-01T10:00:00.000Z", request_hash="h", request=request,
        versions={}, hardware="cpu",
    )  # fmt: skip
    started = jobs.store.start_once(record)
    directory = jobs.workspace.run("sft-student-1")
    (directory / LOG_FILE).write_text("-- loading\nstep 1\n")
    with started.lock, JournalWriter(directory / JOURNAL_FILE, attempt=1) as journal:
        journal.append("state", {"state": "running"})
        journal.append("phase", {"phase": "sft", "event": "started"})
        journal.append("metric", {"step": 1, "values": {"loss": 0.5}})
        yield "sft-student-1", journal


@pytest.fixture(params=["auto", "legacy"])
async def client(request, jobs):
    """A client of either protocol era, connected in memory to the real server over a real workspace."""
    async with Client(build_server(jobs), mode=request.param) as connected:
        yield connected


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
