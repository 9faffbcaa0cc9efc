"""What every executor of other machines can do, what it is given and what it answers; and the programs it calls."""

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from opd_mcp.devices.environment import OFFLINE, absolute_import_path
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.executors import ExecutorSettings, Submission
from opd_mcp.store.claims import Claim

ANSWER_SECONDS = 20.0
TEXT_CHARACTERS = 300


@dataclass(frozen=True)
class Answer:
    """What a program said; `code` is None for one that could not be started or did not end in time."""

    code: int | None
    text: str
    problem: str

    @property
    def well(self) -> bool:
        """Whether it did what it was asked for."""
        return self.code == 0


def ask(command: Sequence[str], given: str = "") -> Answer:
    """Call a program without a shell, with a text as its input."""
    try:
        done = subprocess.run(
            list(command),
            input=given,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            env={**os.environ, "LC_ALL": "C"},  # answers in one language
        )
    except FileNotFoundError:
        return Answer(None, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{command[0]} did not answer within {ANSWER_SECONDS:.0f} s")
    except OSError as error:
        return Answer(None, "", f"{command[0]} could not be started ({error})")
    problem = done.stderr.strip() or f"{command[0]} ended with exit status {done.returncode}"
    return Answer(done.returncode, done.stdout, problem[-TEXT_CHARACTERS:])


@dataclass(frozen=True)
class Work:
    """A worker to start: the argument list, in the run's directory, for the job of a claim.

    `after` is the job whose place in the queue ran out, where this one takes it. `nodes` are the machines that the
    run's devices are on.
    """

    directory: Path
    claim: Claim
    command: list[str]
    after: Submission | None = None
    nodes: int = 1


@dataclass(frozen=True)
class JobState:
    """Where a job is, as its executor says; `unknown` while it does not answer, `expired` where it may wait no longer.

    `position` is its place in the queue, from 1.
    """

    state: Literal["queued", "running", "gone", "expired", "unknown"]
    text: str = ""
    position: int | None = None


class Executor(Protocol):
    """Starts workers on other machines, tells where they are, and ends those that are no longer wanted."""

    def submit(self, work: Work) -> Submission:
        """Hand a worker over; raises RunError `launch_failed`."""
        ...

    def look(self, claim: Claim, submission: Submission) -> JobState:
        """Where a job is."""
        ...

    def restarts(self, submission: Submission) -> int:
        """How often the executor has begun a job anew."""
        ...

    def withdraw(self, claim: Claim, submission: Submission) -> None:
        """End a job, whether it waits or works; nothing for one that is gone."""
        ...

    def report(self) -> str:
        """What the executor says of itself, in a few words."""
        ...


def executor_of(name: str, settings: ExecutorSettings, active: Callable[[], Sequence[Submission]]) -> Executor:
    """The executor that the settings describe; `active` lists where the jobs of active runs are."""
    if settings.kind == "slurm":
        from opd_mcp.supervisor.executors.slurm import Slurm

        return Slurm(name, settings)
    if settings.kind == "ray":
        from opd_mcp.supervisor.executors.ray import Ray

        return Ray(name, settings)
    from opd_mcp.supervisor.executors.ssh import Ssh

    return Ssh(name, settings, active)


def not_launched(name: str, why: str, run_id: str) -> RunError:
    """That an executor took no job."""
    return RunError(
        "launch_failed",
        f"The executor {name!r} did not take the run ({why}).",
        value=run_id,
        fix=f"Correct [executors.{name}] in the workspace's settings.toml, or start again once it answers.",
    )


def preparing_lines(work: Work, settings: ExecutorSettings, environment: Mapping[str, str]) -> list[str]:
    """The lines of a shell script that come before the worker: its folder, what it needs, the setup of the settings.

    No secret of the server is among them: those that a worker needs there are set by the setup.
    """
    lines = ["set -e", "umask 077", f"cd {shlex.quote(str(work.directory))}"]
    lines += [f"export {name}={shlex.quote(environment[name])}" for name in OFFLINE if environment.get(name)]
    path = absolute_import_path(environment)
    if path and settings.python is None:
        lines.append(f"export PYTHONPATH={shlex.quote(path)}")
    return [*lines, "export PYTHONUNBUFFERED=1", *settings.setup]
