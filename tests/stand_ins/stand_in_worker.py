"""The real worker with the stand-in stages; takes the same command line as `opd-mcp worker`."""

import argparse
import os
import sys
from pathlib import Path

from opd_mcp.devices.environment import hub_token
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.worker.main import WorkerSettings, main
from opd_mcp.worker.watchdog import WatchSettings

sys.path.insert(0, str(Path(__file__).parent))


def load_stages():
    import stand_in_stages

    return stand_in_stages


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_id")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--lock-fd", type=int)
    parser.add_argument("--lease-folder", type=Path)
    parser.add_argument("--cpu-slots", type=int)
    parser.add_argument("--ticket")
    parser.add_argument("--life", type=int, default=0)
    parser.add_argument("--stall-seconds", type=float, default=60.0)
    given = parser.parse_args()
    leases = LeaseFolder(given.lease_folder or Path(os.environ["TEST_LEASES"]), given.cpu_slots or 2)
    watch = WatchSettings(floor=given.stall_seconds, poll=0.02)
    job = {"ticket": given.ticket, "life": given.life}
    settings = WorkerSettings(leases, load_stages=load_stages, watch=watch, hub_token=hub_token(os.environ), **job)
    sys.exit(main(given.workspace, given.run_id, given.lock_fd, settings))
