"""The real stdio server over failpoints, with workers that compute nothing.

`python chaos_server.py ROOT PLAN LOG`, started by chaos_servers.py. SIGUSR1 makes it read the plan: from then on hits
count.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from chaos_failpoints import Failpoints, Plan, install

IDLE_SECONDS = 60.0


def main(root: Path, plan_file: Path, log: Path) -> None:
    """Serves until the client closes stdin, or the plan ends it."""
    points = install(None, log)

    def arm(*_: Any) -> None:
        points.plan, points.hits = Plan(**json.loads(plan_file.read_text(encoding="utf-8"))), 0
        points.note("armed")

    signal.signal(signal.SIGUSR1, arm)
    patch_launch(points)
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.server.serve import ServerSettings, serve_stdio
    from opd_mcp.service import JobService
    from opd_mcp.store.roots import AllowedRoots
    from opd_mcp.store.workspace import Workspace

    idle = (sys.executable, str(Path(__file__).with_name("chaos_idle_worker.py")), str(IDLE_SECONDS))
    settings = JobSettings(lease_folder=root / "leases", cpu_slots=2, worker_command=idle)
    points.note("started")
    serve_stdio(lambda: JobService(Workspace(root / "home"), AllowedRoots([]), settings), ServerSettings())


def patch_launch(points: Failpoints) -> None:
    """Put a failpoint under the start of a worker process."""
    start = subprocess.Popen.__init__

    def failing_start(self: Any, *given: Any, **named: Any) -> None:
        points.around("launch", lambda: start(self, *given, **named), needs_space=False)

    subprocess.Popen.__init__ = failing_start  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
