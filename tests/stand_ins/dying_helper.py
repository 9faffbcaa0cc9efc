"""A real helper that is killed at its second part, which it has claimed: `python dying_helper.py`, as a helper."""

import os
import signal

from opd_mcp.engine.generation import generator
from opd_mcp.engine.scoring import local
from opd_mcp.worker.teams import helper_process

parts = {"begun": 0}


def dying(compute):
    def called(*given):
        parts["begun"] += 1
        if parts["begun"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*given)

    return called


generator.drawn_part, local.scored_part = dying(generator.drawn_part), dying(local.scored_part)
helper_process.main()
