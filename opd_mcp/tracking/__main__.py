"""`python -m opd_mcp.tracking WORKSPACE RUN_ID TRACKER ATTEMPT`: the process of a mirror."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from opd_mcp.store.workspace import Workspace
from opd_mcp.tracking.mirror import follow
from opd_mcp.tracking.processes import mirror_of

LOW_PRIORITY = 10


def main(root: str, run_id: str, tracker: Any, attempt: str) -> None:
    """Mirror the run until it has ended there too."""
    os.nice(LOW_PRIORITY)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    follow(mirror_of(Workspace(Path(root)), run_id, tracker, int(attempt)))


if __name__ == "__main__":
    main(*sys.argv[1:])
