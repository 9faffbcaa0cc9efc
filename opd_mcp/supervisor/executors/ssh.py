"""ssh: the worker is started detached on a host that shares the workspace's folder; nothing asks a question.

A script goes to the host's `/bin/sh` through ssh's input, so that no remote shell parses an argument of ours.
"""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence

from opd_mcp.schemas.executors import Claim, SshExecutor, Submission
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.supervisor.executors.interface import Answer, JobState, Work, ask, not_launched, preparing_lines

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-T")
STARTED = "opd-mcp-worker "
GONE = "opd-mcp-gone"


class Ssh:
    """Some hosts, of which each run gets one."""

    def __init__(self, name: str, settings: SshExecutor, active: Callable[[], Sequence[Submission]]) -> None:
        self.name = name
        self._settings = settings
        self._active = active

    def submit(self, work: Work) -> Submission:
        """Start the worker on the host with the fewest; raises RunError `launch_failed` where none answers."""
        problems = []
        for host in self._by_use():
            answer = self._on(host, self.script(work))
            pid = answer.text.rpartition(STARTED)[2].strip()
            if answer.well and pid.isdigit():
                return Submission(job=pid, host=host)
            problems.append(f"{host}: {answer.problem}")
            if answer.code != 255:  # ssh's own: the host was not reached; any other is the script's
                break
        raise not_launched(self.name, "; ".join(problems), work.directory.name)

    def script(self, work: Work) -> str:
        """What the host's shell does: it prepares, starts the worker in a session of its own, and tells its pid."""
        lines = [
            *preparing_lines(work, self._settings, os.environ),
            f"setsid {shlex.join(work.command)} </dev/null >>{shlex.quote(LOG_FILE)} 2>&1 &",
            f'echo "{STARTED}$!"',
        ]
        return "\n".join(lines) + "\n"

    def look(self, claim: Claim, submission: Submission) -> JobState:
        """Whether the process is there; the ticket in its arguments tells it from another one with its number."""
        answer = self._on(str(submission.host), _if_there(claim, submission, "echo there", f"echo {GONE}"))
        if not answer.well:
            return JobState("unknown", f"{submission.host}: {answer.problem}")
        if GONE in answer.text:
            return JobState("gone", f"The worker's process on {submission.host} is gone, without a final state.")
        return JobState("running")

    def restarts(self, submission: Submission) -> int:
        """Never: a process that is gone is begun by a resume only."""
        return 0

    def withdraw(self, claim: Claim, submission: Submission) -> None:
        """SIGTERM to the process; its guardian kills it if it does not end."""
        self._on(str(submission.host), _if_there(claim, submission, f"kill -TERM {int(submission.job)}", ":"))

    def report(self) -> str:
        """Which hosts answer."""
        answers = [(host, self._on(host, "true\n")) for host in self._settings.hosts[:8]]
        return "; ".join(f"{host} answers" if answer.well else f"{host}: {answer.problem}" for host, answer in answers)

    def _on(self, host: str, script: str) -> Answer:
        return ask([*SSH, *self._settings.options, host, "/bin/sh -s"], script)

    def _by_use(self) -> list[str]:
        used = Counter(submission.host for submission in self._active())
        return sorted(self._settings.hosts, key=lambda host: used[host])


def _if_there(claim: Claim, submission: Submission, then: str, other: str) -> str:
    return f'case "$(ps -o args= -p {int(submission.job)})" in *{claim.ticket}*) {then};; *) {other};; esac\n'
