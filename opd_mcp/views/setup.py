"""What `inspect_setup` answers."""

import platform

import psutil

import opd_mcp
from opd_mcp.devices.hardware import available_memory, free_disk, gpus
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.answers import ActiveRun, Device, ExamplePaths, SetupReport
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.executors import ExecutorReport
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.runs import Quotas, RunKind, RunState
from opd_mcp.store.roots import AllowedRoots, ExportRoots
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, read_settings
from opd_mcp.views.next_steps import first_step

ACTIVE: tuple[RunState, ...] = ("running", "queued")
MAX_ACTIVE_RUNS = 20


def setup_report(
    store: Store,
    roots: AllowedRoots,
    exports: ExportRoots,
    leases: LeaseFolder,
    settings: JobSettings,
    executors: list[ExecutorReport],
) -> SetupReport:
    """The machine, the workspace, the limits and the embedded example; settings that cannot be read are a problem."""
    example = example_paths(settings)
    problem = settings_problem(store.workspace)
    return SetupReport(
        version=opd_mcp.__version__,
        python=platform.python_version(),
        devices=devices(leases),
        executors=executors or None,
        free_disk_bytes=free_disk(store.workspace.root),
        workspace=str(store.workspace.root),
        allowed_roots=[str(root) for root in roots.roots],
        export_roots=[*map(str, exports.roots), *(f"hub:{owner}" for owner in exports.hub_owners)] or None,
        active_runs=active_runs(store),
        quotas=Quotas() if problem else read_settings(store.workspace).quotas,
        problem=problem,
        example=example,
        next_action=first_step(example, problem),
    )


def settings_problem(workspace: Workspace) -> Finding | None:
    """Why the workspace's settings cannot be used, so that no run can start; None when they can."""
    try:
        read_settings(workspace)
    except OpdError as error:
        return Finding(
            code=error.code, message=f"{error.message} Got: {error.value!r}.", fix=error.fix, call=error.call
        )
    return None


def devices(leases: LeaseFolder) -> list[Device]:
    """The CPU and the GPUs, each with its slots."""
    slots = leases.cpu_slot_names()
    cpu = Device(
        kind="cpu",
        name=platform.processor() or platform.machine(),
        total_memory_bytes=int(psutil.virtual_memory().total),
        free_memory_bytes=available_memory(),
        slots=len(slots),
        slots_busy=len(leases.busy(slots)),
    )
    found = [
        Device(
            kind="cuda",
            name=gpu.name,
            uuid=gpu.uuid,
            total_memory_bytes=gpu.total_memory,
            free_memory_bytes=gpu.free_memory,
            slots=1,
            slots_busy=len(leases.busy([f"gpu-{gpu.uuid}"])),
        )
        for gpu in gpus()
    ]
    return [*found, cpu]


def active_runs(store: Store) -> list[ActiveRun]:
    """The running and queued runs, each with its phase."""
    rows = [row for state in ACTIVE for row in store.list_runs(state=state, limit=MAX_ACTIVE_RUNS).rows]
    return [_active_run(store, row.run_id, row.kind, row.state) for row in rows]


def example_paths(settings: JobSettings) -> ExamplePaths | None:
    """The embedded task's absolute paths; None where it is not installed."""
    folder = settings.examples / "arithmetic"
    names = {
        "teacher": "teacher",
        "teacher_other_style": "teacher_other_style",
        "student": "student",
        "prompts_sft": "sft.jsonl",
        "prompts_opd": "opd.jsonl",
        "prompts_tune": "tune.jsonl",
        "prompts_eval": "eval.jsonl",
    }
    paths = {name: folder / file for name, file in names.items()}
    if not all(path.exists() for path in paths.values()):
        return None
    return ExamplePaths(**{name: str(path) for name, path in paths.items()})


def _active_run(store: Store, run_id: str, kind: RunKind, state: RunState) -> ActiveRun:
    return ActiveRun(run_id=run_id, kind=kind, state=state, phase=store.view(run_id).phase)
