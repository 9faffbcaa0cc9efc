"""`opd-mcp doctor`: checks that this machine has everything a run needs, and says how to fix what is missing."""

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opd_mcp.devices.hardware import free_disk
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.texts import byte_size
from opd_mcp.service import JobService
from opd_mcp.store.workspace import read_settings, wants_tracking
from opd_mcp.views.setup import example_paths, settings_problem

NEEDED_PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "safetensors")
MIN_FREE_BYTES = 2 << 30
PROCESS_ALERTS = ("worker_stopped", "worker_stuck")


@dataclass(frozen=True)
class Check:
    """One check; `fix` and `call` say what to do when it fails."""

    name: str
    well: bool
    found: str
    fix: str = ""
    call: NextAction | None = None


class CheckReport(Schema):
    """All checks, as `opd-mcp doctor --json` prints them."""

    well: bool
    checks: list[dict[str, Any]]

    @classmethod
    def of(cls, found: Sequence[Check]) -> Self:
        """The report of these checks; a fix only where it is needed."""
        rows: list[dict[str, Any]] = []
        for check in found:
            row: dict[str, Any] = {"name": check.name, "well": check.well, "found": check.found}
            if not check.well:
                row |= {"fix": check.fix, **({"call": check.call.to_dict()} if check.call else {})}
            rows.append(row)
        return cls(well=all(check.well for check in found), checks=rows)


def checks(service: JobService) -> Iterator[Check]:
    """All checks, in the order of a set-up; nothing heavy is imported."""
    version = platform.python_version()
    yield Check("python", sys.version_info >= (3, 11), version, "Install Python 3.11 or newer and make the venv anew.")
    yield Check("system", os.name == "posix", platform.system(), "Use Linux, macOS or WSL: the locks are POSIX flock.")
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    yield Check(
        "packages", not missing, f"missing: {', '.join(missing)}" if missing else "all there", "pip install -e ."
    )
    root = service.workspace.root
    yield Check("workspace", os.access(root, os.W_OK), str(root), "Set OPD_HOME to a folder that you may write to.")
    free = free_disk(root)
    fix = "Free disk space, or move the workspace with OPD_HOME."
    yield Check("disk", free >= MIN_FREE_BYTES, f"{byte_size(free)} free", fix)
    yield _settings(service)
    yield _trackers(service)
    yield _index(service)
    damaged = [f"{problem.value}: {problem.message}" for problem in service.store.damaged()]
    found = "; ".join(damaged[:5]) or "none"
    yield Check("damaged files", not damaged, found, "Remove what is damaged; a run that needs it makes it again.")
    yield _workers(service)
    leases = service.settings.lease_folder
    leases.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield Check(
        "device locks", os.access(leases, os.W_OK), str(leases), "Make this folder yours, or set XDG_RUNTIME_DIR."
    )
    example = example_paths(service.settings)
    yield Check("example", example is not None, "installed" if example else "not found", "Install from a checkout.")


def _settings(service: JobService) -> Check:
    problem = settings_problem(service.workspace)
    return (
        Check("settings", False, problem.message, problem.fix, problem.call)
        if problem
        else Check("settings", True, "readable")
    )


def _trackers(service: JobService) -> Check:
    """Whether the trackers of the settings are installed and have the runs."""
    if not wants_tracking(service.workspace):
        return Check("trackers", True, "none are set")
    from opd_mcp.tracking.processes import missing_trackers, not_installed, untracked_runs

    names = read_settings(service.workspace).tracking.trackers
    problems = [*map(not_installed, missing_trackers(names)), *untracked_runs(service.workspace)]
    fix = "Install what is missing; then opd-mcp track RUN sends a run."
    return Check("trackers", not problems, "; ".join(problems[:5]) or ", ".join(names), fix)


def _workers(service: JobService) -> Check:
    """Whether every active run's process runs, and whether it answers its cancel request."""
    try:
        active = service.store.active_runs()
    except OpdError as error:
        return Check("workers", False, error.message, error.fix, error.call)
    alerts = [(run_id, alert) for run_id in active for alert in service.status(run_id).alerts]
    halted = [f"{run_id}: {alert.message}" for run_id, alert in alerts if alert.code in PROCESS_ALERTS]
    fix = "Continue or cancel a stopped run; what waits in the kernel ends with that wait."
    return Check("workers", not halted, "; ".join(halted) or "none is stopped", fix)


def _index(service: JobService) -> Check:
    fix = "Run opd-mcp doctor --repair."
    try:
        indexed = {row.run_id for row in service.store.index.runs()}
    except OpdError as error:
        return Check("index", False, error.message, error.fix, error.call)
    on_disk = {path.name for path in service.workspace.runs.iterdir() if (path / "run.json").is_file()}
    return Check("index", on_disk <= indexed, f"{len(on_disk)} runs, {len(on_disk & indexed)} of them indexed", fix)
