"""A worker that computes nothing: it holds the run's lock, keeps its journal, and ends when told to or in time.

Takes `SECONDS` and then the command line of `opd-mcp worker`; chaos_servers.py and chaos_contention.py start it.
"""

import argparse
import sys
import time
from pathlib import Path

from opd_mcp.store.runs import RunLock, taken_up


def main() -> int:
    """0, as nothing can fail."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("run_id")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--lock-fd", type=int)
    given, _ = parser.parse_known_args()
    directory = given.workspace / "runs" / given.run_id
    end = time.monotonic() + given.seconds
    with RunLock.adopt(directory, given.lock_fd) as lock, taken_up(lock) as journal:
        journal.append("state", {"state": "running"})
        journal.append("phase", {"phase": "sft", "event": "started"})
        for step in range(1, 4):
            journal.append("metric", {"step": step, "values": {"loss": 1.0 / step}}, durable=False)
        while time.monotonic() < end and not (directory / "cancel").exists():
            time.sleep(0.05)
        stopped = (directory / "cancel").exists()
        journal.append("state", {"state": "cancelled" if stopped else "succeeded"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
