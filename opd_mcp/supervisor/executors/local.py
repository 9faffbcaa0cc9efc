"""This machine: the worker is a detached process that inherits the run's lock.

The command line is `opd-mcp worker RUN_ID --workspace PATH --lock-fd N --lease-folder PATH --cpu-slots N`, with this
Python and not by way of a shell or PATH; it ends in `opd_mcp.worker.main.main`, whose answer is the exit status.
"""

import os
import subprocess

from opd_mcp.devices.environment import worker_environment
from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import RunError
from opd_mcp.store.logs import open_log
from opd_mcp.store.runs import LOG_FILE, RunLock
from opd_mcp.store.workspace import Workspace


def worker_command(workspace: Workspace, run_id: str, lock_fd: int, settings: JobSettings) -> list[str]:
    """The worker's argument list."""
    return [
        *(*settings.worker_command, run_id),
        *("--workspace", str(workspace.root)),
        *("--lock-fd", str(lock_fd)),
        *("--lease-folder", str(settings.lease_folder)),
        *("--cpu-slots", str(settings.cpu_slots)),
    ]


def launch_worker(workspace: Workspace, lock: RunLock, settings: JobSettings) -> subprocess.Popen[bytes]:
    """The run's detached process, which inherits the lock; the caller's copy is closed.

    The lock never goes free in between, so a queued run never looks lost. Raises RunError `launch_failed`.
    """
    run_id = lock.directory.name
    try:
        with open_log(lock.directory / LOG_FILE) as log:
            return subprocess.Popen(
                worker_command(workspace, run_id, lock.descriptor, settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=lock.directory,
                start_new_session=True,
                pass_fds=(lock.descriptor,),
                env=worker_environment(os.environ),
            )
    except OSError as error:
        raise RunError(
            "launch_failed",
            f"The worker process could not be started ({error}).",
            value=run_id,
            fix="Check the machine's process and memory limits, then start again.",
        ) from error
    finally:
        lock.release()
