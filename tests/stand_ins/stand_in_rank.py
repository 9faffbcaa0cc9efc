"""A rank without torch: it does what the facts say for its number, by the real channel."""

import json
import os
import signal
import sys
import time

from opd_mcp.schemas.errors import RunError
from opd_mcp.worker.teams.rank_process import Channel, line_of
from opd_mcp.worker.teams.ranks import DONE, FAILED, described

facts = json.loads(sys.stdin.buffer.read())
channel = Channel(line_of(facts))
rank = facts["place"]["rank"]
for act, *given in facts["acts"][rank]:
    if act == "tell":
        channel.tell(*given)
    elif act == "ask":
        channel.tell("metric", rank, {"answer": channel.ask(*given)})
    elif act == "done":
        channel.tell(DONE, json.dumps(given[0]))
    elif act == "signal":
        os.kill(os.getpid(), signal.Signals[given[0]])
    elif act == "exit":
        os._exit(given[0])
    elif act == "sleep":
        time.sleep(given[0])
    elif act == "raise":
        kinds = {
            "run": RunError("bad_number", "Numbers are not finite.", value="nan", fix="Lower the rate."),
            "memory": MemoryError("can't allocate memory"),
            "disk": OSError(28, "No space left on device"),
            "group": RuntimeError("gloo: Connection closed by peer"),
        }
        channel.tell(FAILED, described(kinds[given[0]], group=given[0] == "group"))
        os._exit(1)
os._exit(0)
