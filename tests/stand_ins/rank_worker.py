"""A worker's team of real ranks, one of which, or the worker, is killed when rank 0 calls something the Nth time.

`python rank_worker.py FACTS.json`; each line on stdout is JSON: the processes, then how it ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from opd_mcp.schemas.errors import OpdError
from opd_mcp.worker.teams.ranks import RankTeam, RankWork

given = json.loads(Path(sys.argv[1]).read_bytes())
victim, calls, killed = given["victim"], {"count": 0}, [0.0]
pids: list[int] = []


def answer(name: str):
    def called(*args):
        if not pids:
            pids.extend(rank.process.pid for rank in team.ranks)
            print(json.dumps(pids), flush=True)
        if name == given["call"]:
            calls["count"] += 1
            if calls["count"] == given["nth"]:
                killed[0] = time.monotonic()
                number = signal.Signals[given.get("signal", "SIGKILL")]
                os.kill(os.getpid() if victim == "worker" else pids[victim], number)
        return {"position": 0, "should_stop": False}.get(name)

    return called


names = ("phase", "progress", "metric", "alert", "resumed", "position", "should_stop", "check_fence")
command = [sys.executable, "-P", str(Path(__file__).with_name("rank_work.py"))]
facts = {"case": given["case"], "summary": given["summary"]}
work = RankWork(facts, [None] * given.get("ranks", 2), Path(given["folder"]), given.get("group_seconds", 60.0), command)
team = RankTeam(work, {name: answer(name) for name in names}, {})
try:
    team.trained()
    ended = {"code": None}
except OpdError as error:
    ended = {"code": error.code, "message": error.message}
seconds = time.monotonic() - killed[0]
print(json.dumps({**ended, "seconds": seconds, "left": [pid for pid in pids if psutil.pid_exists(pid)]}), flush=True)
