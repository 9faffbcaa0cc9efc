"""Slurm: `sbatch` of the worker's command line; `squeue` and `scontrol` tell the queue position and causes.

Before a time limit and at a preemption Slurm sends SIGTERM: the worker writes a checkpoint, queues its next attempt and
ends with `REQUEUE_STATUS`; the script then requeues its job, unless Slurm does so itself.
"""

import os
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from opd_mcp.schemas.executors import Claim, SlurmExecutor, Submission
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.supervisor.executors.interface import JobState, Work, ask, not_launched, preparing_lines

REQUEUE_STATUS = 75
LOOK_SECONDS = 5.0
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
WORKING = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
)
QUEUE_FORMAT = "%i|%T|%r|%P"


@dataclass(frozen=True)
class Listed:
    """A job as `squeue` lists it."""

    state: str
    reason: str
    partition: str


class Slurm:
    """One cluster, by its client programs."""

    def __init__(self, name: str, settings: SlurmExecutor, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: dict[str, Listed] = {}
        self._looked: float | None = None

    def submit(self, work: Work) -> Submission:
        """Submit the script; raises RunError `launch_failed`."""
        answer = ask(self.command(work), self.script(work))
        job = answer.text.strip().partition(";")[0]  # a federation adds the cluster's name
        if not answer.well or not job.isdigit():
            raise not_launched(
                self.name, answer.problem if not answer.well else f"sbatch said {job!r}", work.directory.name
            )
        return Submission(job=job)

    def command(self, work: Work) -> list[str]:
        """The call of `sbatch`, which reads the script from its input."""
        settings = self._settings
        log = str(work.directory / LOG_FILE).replace("%", "%%")
        named = {"partition": settings.partition, "account": settings.account, "qos": settings.qos}
        return [
            *("sbatch", "--parsable", f"--job-name=opd-{work.claim.ticket}", f"--comment={work.directory.name}"),
            *(f"--output={log}", "--open-mode=append", f"--chdir={work.directory}"),
            # Not one variable of the server: the script sets what the worker needs.
            *("--export=NIL", "--requeue", f"--nodes={work.nodes}", "--ntasks-per-node=1"),
            f"--cpus-per-task={settings.cpus}",
            *([f"--{settings.gpu_option}={_gpus(settings)}"] if settings.gpus else []),
            f"--signal=B:TERM@{settings.signal_seconds}",
            *([f"--time={settings.time_limit}"] if settings.time_limit else []),
            *(f"--{option}={value}" for option, value in named.items() if value),
            *settings.options,
        ]

    def script(self, work: Work) -> str:
        """The batch script: the shell stays, to pass signals on and to requeue its job."""
        hosts = ' --hosts "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"' if work.nodes > 1 else ""
        lines = [
            "#!/bin/sh",
            "export PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}",
            *preparing_lines(work, self._settings, os.environ),
            "set +e",
            f'{shlex.join(work.command)} --life "${{SLURM_RESTART_COUNT:-0}}"{hosts} </dev/null &',
            "worker=$!",
            "trap 'kill -TERM \"$worker\" 2>/dev/null' TERM",
            'wait "$worker"; status=$?',
            'while kill -0 "$worker" 2>/dev/null; do wait "$worker"; status=$?; done',
            f'if [ "$status" -eq {REQUEUE_STATUS} ]; then',
            # A job that somebody cancels or that is being requeued is not running any more.
            '  case "$(scontrol show job "$SLURM_JOB_ID")" in',
            '    *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID";;',
            "  esac",
            "fi",
            'exit "$status"',
        ]
        return "\n".join(lines) + "\n"

    def look(self, claim: Claim, submission: Submission) -> JobState:
        """Where the job is."""
        job = submission.job
        problem = self._read_queue(needed=job)
        with self._lock:
            found = self._queue.get(job)
            pending = [other for other, listed in self._queue.items() if _waits_with(listed, found)]
        if problem is not None:
            return JobState("unknown", problem)
        if found is not None and found.state in WAITING:
            return JobState("queued", found.reason, pending.index(job) + 1)
        if found is not None and found.state in WORKING:
            return JobState("running")
        return JobState("gone", self._ending(job, found))

    def restarts(self, submission: Submission) -> int:
        """How often Slurm has requeued the job."""
        return int(self._shown(submission.job).get("Restarts", "0"))

    def withdraw(self, claim: Claim, submission: Submission) -> None:
        """Cancel the job; Slurm sends SIGTERM, then SIGKILL, to one that works."""
        ask(["scancel", submission.job])
        with self._lock:
            self._looked = None

    def report(self) -> str:
        """How many nodes there are, by their state."""
        where = [f"--partition={self._settings.partition}"] if self._settings.partition else []
        answer = ask(["sinfo", "--noheader", "--format=%D %T", *where])
        if not answer.well:
            return f"does not answer: {answer.problem}"
        return "nodes: " + (", ".join(answer.text.split("\n")).strip(", ") or "none")

    def _read_queue(self, needed: str) -> str | None:
        """Refresh the list of jobs, at most every five seconds unless the needed one is missing; why it failed."""
        with self._lock:
            fresh = self._looked is not None and self._clock() - self._looked < LOOK_SECONDS
            if fresh and needed in self._queue:
                return None
            # In the order of the queue: the highest priority first, then the oldest.
            answer = ask(["squeue", "--noheader", "--states=all", f"--format={QUEUE_FORMAT}", "--sort=-p,i"])
            if not answer.well:
                return answer.problem
            parts = [line.split("|") for line in answer.text.splitlines()]
            self._queue = {part[0]: Listed(part[1], part[2], part[3]) for part in parts if len(part) == 4}
            self._looked = self._clock()
        return None

    def _shown(self, job: str) -> dict[str, str]:
        answer = ask(["scontrol", "--oneliner", "show", "job", job])
        return dict(word.split("=", 1) for word in answer.text.split() if "=" in word)

    def _ending(self, job: str, listed: Listed | None) -> str:
        if listed is not None:
            code = self._shown(job).get("ExitCode", "")
            reason = f", {listed.reason}" if listed.reason not in ("None", "") else ""
            return f"Slurm's job {job} ended: {listed.state}{reason}{f', exit code {code}' if code else ''}."
        answer = ask(
            ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode", f"--jobs={job}"]
        )
        state = answer.text.strip().splitlines()[-1].replace("|", ", exit code ") if answer.text.strip() else ""
        return f"Slurm's job {job} ended: {state}." if state else f"Slurm does not list job {job} any more."


def _gpus(settings: SlurmExecutor) -> str:
    return f"gpu:{settings.gpus}" if settings.gpu_option == "gres" else str(settings.gpus)


def _waits_with(listed: Listed, other: Listed | None) -> bool:
    return other is not None and listed.state in WAITING and listed.partition == other.partition
