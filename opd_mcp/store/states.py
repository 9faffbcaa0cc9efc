"""The states of a run and their transitions; this is the only place that knows them.

    queued → running → succeeded | failed | cancelled
    queued, running → lost                     never written: an active run whose lock is free
    failed, cancelled, lost → queued           a resume: the next attempt of the same run

The lock is the right to write. The process that takes it begins an attempt by writing `queued` under the next attempt
number; from that line on, earlier attempts are fenced off: their writers refuse, and readers drop their later lines.
"""

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.runs import FINAL_STATES, RunState

TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    "queued": frozenset({"running", "failed", "cancelled", "lost"}),
    "running": frozenset({"succeeded", "failed", "cancelled", "lost"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
    "lost": frozenset({"queued"}),
}


def state_of(written: RunState, alive: bool) -> RunState:
    """The state of a run whose journal ends with `written`; `alive`: a process holds its lock."""
    return written if written in FINAL_STATES or alive else "lost"


def require_transition(before: RunState, after: RunState) -> None:
    """Raise ValueError for a transition that does not exist: a mistake of the program, never of its user."""
    if after not in TRANSITIONS[before]:
        raise ValueError(f"a run does not go from {before} to {after}")


def require_resumable(state: RunState, run_id: str) -> None:
    """Raise RunError `run_not_active` for a run that has nothing left to do."""
    if "queued" not in TRANSITIONS[state]:
        raise RunError(
            "run_not_active",
            f"The run has ended: {state}. There is nothing to resume.",
            value=run_id,
            fix="Read its result.",
            call=next_call("get_run_status", run_id=run_id),
        )
