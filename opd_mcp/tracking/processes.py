"""The mirrors of a run: started detached, each with the secrets of its own tracker only; or run here, to catch up."""

import logging
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import get_args

from pydantic import Field

from opd_mcp.devices.environment import tracker_environment
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.runs import TrackerName
from opd_mcp.store.logs import open_log
from opd_mcp.store.runs import read_record
from opd_mcp.store.workspace import SETTINGS_FILE, Workspace, read_settings
from opd_mcp.tracking.feed import TrackedRun
from opd_mcp.tracking.mirror import Mirror, follow, read_position
from opd_mcp.tracking.trackers import tracker_of

logger = logging.getLogger(__name__)


def missing_trackers(names: list[TrackerName]) -> list[TrackerName]:
    """Those whose package is not installed."""
    return [name for name in names if find_spec(name) is None]


def launch_mirrors(
    workspace: Workspace, run_id: str, attempt: int, environment: Mapping[str, str]
) -> list[subprocess.Popen[bytes]]:
    """The processes that mirror this attempt of a run; one that cannot be started is logged, and the run goes on."""
    names = read_settings(workspace).tracking.trackers
    missing = missing_trackers(names)
    folder = workspace.tracking_of(run_id)
    started = []
    for name in dict.fromkeys(names):
        if name in missing:
            logger.warning(not_installed(name))
            continue
        command = [sys.executable, "-P", "-m", "opd_mcp.tracking", str(workspace.root), run_id, name, str(attempt)]
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open_log(folder / f"{name}.log") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    start_new_session=True,
                    env=tracker_environment(environment, name),
                )
        except OSError as error:
            logger.warning("The mirror to %s could not be started: %s", name, error)
            continue
        started.append(process)
    return started


def mirror_of(workspace: Workspace, run_id: str, name: TrackerName, attempt: int) -> Mirror:
    """The mirror of a run to a tracker; raises IntegrityError `damaged_file`."""
    settings = read_settings(workspace).tracking
    directory, folder = workspace.run(run_id), workspace.tracking_of(run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    run = TrackedRun.of(read_record(directory), workspace.tracking)
    return Mirror(directory, folder, name, run, lambda: tracker_of(name, settings), settings, attempt)


class TrackerState(Schema):
    """Where a run stands at a tracker."""

    tracker: TrackerName
    complete: bool = Field(description="whether the tracker has the whole run, its end included")
    problem: str | None = None


class TrackingReport(Schema):
    """Where a run stands at all trackers of the settings."""

    run_id: str
    trackers: list[TrackerState]


def caught_up(workspace: Workspace, run_id: str) -> TrackingReport:
    """Where the run stands after each tracker of the settings was tried, until the run's end while it is active.

    Raises ArgumentError `invalid_setting` where the settings name no tracker, RunError `run_locked` while another
    process sends the run.
    """
    names = read_settings(workspace).tracking.trackers
    if not names:
        raise ArgumentError(
            "invalid_setting",
            "The settings name no tracker.",
            value=SETTINGS_FILE,
            fix='Write tracking = ["trackio"] there; docs/tracking.md says what else.',
        )
    found, missing = [], missing_trackers(names)
    for name in dict.fromkeys(names):
        if name in missing:
            found.append(TrackerState(tracker=name, complete=False, problem=not_installed(name)))
            continue
        mirror = mirror_of(workspace, run_id, name, sys.maxsize)
        if not mirror.position.complete:
            mirror.settings = mirror.settings.model_copy(update={"keep_trying_hours": 0.0})
            follow(mirror, wait=False)
        position = mirror.position
        found.append(TrackerState(tracker=name, complete=position.complete, problem=position.problem))
    return TrackingReport(run_id=run_id, trackers=found)


def report_text(report: TrackingReport) -> str:
    """A line per tracker."""
    return "\n".join(
        f"{row.tracker}: {'complete' if row.complete else row.problem or 'not complete yet'}" for row in report.trackers
    )


def not_installed(name: TrackerName) -> str:
    """That a tracker's package is missing, and how to get it."""
    return f"{name} is not installed: pip install 'opd-mcp[{name}]'"


def untracked_runs(workspace: Workspace) -> list[str]:
    """Runs that a tracker did not take, with why."""
    found = []
    for folder in sorted((workspace.tracking / "runs").glob("*")):
        for name in get_args(TrackerName):
            position = read_position(folder, name)
            if position.problem and not position.complete:
                found.append(f"{folder.name} at {name}: {position.problem}")
    return found
