"""The real worker over failpoints; takes the command line of `opd-mcp worker` after the plan and the log.

Run by chaos.py as `JobSettings.worker_command`, never by hand: `python chaos_worker.py PLAN LOG RUN_ID --workspace …`.
"""

import json
import sys
from pathlib import Path

from chaos_failpoints import Plan, install, patch_native_writers


def main(plan_file: Path, log: Path, rest: list[str]) -> None:
    """Ends with the worker's exit status, if the plan lets it."""
    plan = Plan(**json.loads(plan_file.read_text(encoding="utf-8"))) if plan_file.exists() else None
    points = install(plan, log)
    points.note("started")
    from opd_mcp.worker import main as worker

    load = worker.engine_stages

    def engine_over_failpoints() -> object:
        stages = load()
        patch_native_writers(points)
        return stages

    made = worker.WorkerSettings.__init__
    made.__defaults__ = tuple(  # the command line gives no stages of its own
        engine_over_failpoints if value is load else value for value in made.__defaults__ or ()
    )
    sys.argv = ["opd-mcp", "worker", *rest]
    from opd_mcp.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
