"""Ray: the worker is the entrypoint of a job on an existing cluster, by the Jobs API of its dashboard; no ray here.

Ray gives a job's entrypoint its GPUs and cores as it gives them to an actor: all of them on one node, or it waits. When
the entrypoint ends or its node dies, the actor around it is gone and what it held is free.
"""

import os
import shlex
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_mcp.schemas.executors import Claim, RayExecutor, Submission
from opd_mcp.store.runs import LOG_FILE
from opd_mcp.supervisor.executors.interface import (
    ANSWER_SECONDS,
    TEXT_CHARACTERS,
    JobState,
    Work,
    not_launched,
    preparing_lines,
)

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 2.0
# From the SIGTERM of `ray job stop` to its SIGKILL; by default 3, too few for a checkpoint.
STOP_SECONDS = 60
NODES = "/api/v0/nodes?detail=true&limit=10000"
# Ray's message for a job that has waited for longer than its start limit (15 minutes by default) names the limit.
START_LIMIT = "RAY_JOB_START_TIMEOUT_SECONDS"
WITHDRAWING = """
import sys, ray
ray.init(address="auto", namespace="SUPERVISOR_ACTOR_RAY_NAMESPACE", log_to_driver=False)
ray.kill(ray.get_actor("_ray_internal_job_actor_" + sys.argv[1]))
"""


@dataclass(frozen=True)
class Reply:
    """What the dashboard said; `status` is None where it was not reached."""

    status: int | None
    found: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def well(self) -> bool:
        """Whether it is an answer."""
        return self.status == 200


class Ray:
    """One cluster, by its dashboard."""

    def __init__(self, name: str, settings: RayExecutor, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Reply]] = {}

    def submit(self, work: Work) -> Submission:
        """Submit the script; raises RunError `launch_failed`."""
        job = f"opd-{work.claim.ticket}"
        if work.after is not None:
            job += f"-{_turn(work.after) + 1}"
        settings = self._settings
        reply = self._submitted(
            job,
            {
                "entrypoint": self.script(work),
                "metadata": {"opd_run": work.directory.name},
                "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
                "entrypoint_num_cpus": settings.cpus,
                "entrypoint_num_gpus": settings.gpus,
                **({"entrypoint_resources": settings.resources} if settings.resources else {}),
            },
        )
        if not reply.well:
            raise not_launched(self.name, reply.problem, work.directory.name)
        return Submission(job=job)

    def script(self, work: Work) -> str:
        """What the node's shell does; all that it says goes to the run's log, or to Ray's where that is not there."""
        lines = [
            "umask 077",
            f"exec </dev/null >>{shlex.quote(str(work.directory / LOG_FILE))} 2>&1",
            "unset PYTHONPATH PYTHONHOME",  # of Ray's Python, which is another one
            *([] if self._settings.gpus else ["export CUDA_VISIBLE_DEVICES="]),  # Ray would show it all of the node's
            *preparing_lines(work, self._settings, os.environ),
            f"exec {shlex.join(work.command)}",
        ]
        return "\n".join(lines) + "\n"

    def look(self, claim: Claim, submission: Submission) -> JobState:
        """Where the job is."""
        reply = self._read(f"/api/jobs/{submission.job}")
        if reply.status == 404 and "does not exist" in reply.problem:
            return JobState("gone", f"Ray does not list job {submission.job} any more; was its cluster restarted?")
        status = reply.found.get("status")
        if status == "PENDING":
            return JobState("queued", self._waits_for())
        if status == "RUNNING":
            return JobState("running")
        if not reply.well or not isinstance(status, str):
            return JobState("unknown", reply.problem)
        message = str(reply.found.get("message") or "")
        if START_LIMIT in message:
            return JobState("expired", "Ray's time limit for waiting jobs is over")
        return JobState("gone", f"Ray's job {submission.job} ended: {status}{_cause(reply.found, message)}")

    def restarts(self, submission: Submission) -> int:
        """Never: Ray runs a job once."""
        return 0

    def withdraw(self, claim: Claim, submission: Submission) -> None:
        """Stop the job, by SIGTERM first; one that waits is taken out of Ray's queue.

        Ray delivers a stop only once the job has begun. Until then it would wait on, and an autoscaler would start a
        node for it; so a second job, which needs no resources and runs on the head node, kills the waiting actor.
        """
        job = submission.job
        self._ask("POST", f"/api/jobs/{job}/stop")
        with self._lock:
            self._known.clear()
        if self.look(claim, submission).state == "queued":
            entrypoint = f"exec python -c {shlex.quote(WITHDRAWING)} {shlex.quote(job)}"
            self._submitted(f"withdraw-{job}", {"entrypoint": entrypoint})

    def report(self) -> str:
        """Ray's version, and what its nodes have."""
        version = self._read("/api/version")
        if not version.well:
            return f"does not answer: {version.problem}"
        nodes = self._nodes()
        if nodes is None:
            return f"Ray {version.found.get('ray_version')}"
        has = [_amount(sum(node.get(kind, 0) for node in nodes), kind) for kind in ("CPU", "GPU")]
        return f"Ray {version.found.get('ray_version')}: {_amount(len(nodes), 'node')}, {', '.join(has)}"

    def _waits_for(self) -> str:
        settings, nodes = self._settings, self._nodes()
        wanted = {"GPU": settings.gpus, "CPU": settings.cpus, **settings.resources}
        text = " and ".join(_amount(amount, kind) for kind, amount in wanted.items() if amount)
        if nodes is not None and not any(_has(node, wanted) for node in nodes):
            return f"no node of the cluster has {text}"
        return f"waits for {text} on one node"

    def _nodes(self) -> list[dict[str, float]] | None:
        """The resources of each node that is alive; None where the dashboard does not tell."""
        try:
            listed = self._read(NODES).found["data"]["result"]["result"]
            return [node["resources_total"] or {} for node in listed if node["state"] == "ALIVE"]
        except (KeyError, TypeError):
            return None

    def _submitted(self, job: str, request: Mapping[str, Any]) -> Reply:
        """The answer to a submission; one that failed is none where the job is there all the same, or already was."""
        reply = self._ask("POST", "/api/jobs/", {"submission_id": job, **request})
        there = reply if reply.well else self._ask("GET", f"/api/jobs/{job}")
        return there if there.well else reply

    def _read(self, path: str) -> Reply:
        """An answer that is at most two seconds old."""
        with self._lock:
            now = self._clock()
            self._known = {path: kept for path, kept in self._known.items() if now - kept[0] < LOOK_SECONDS}
            if path not in self._known:
                self._known[path] = now, self._ask("GET", path)
            return self._known[path][1]

    def _ask(self, method: str, path: str, content: object = None) -> Reply:
        """One request on a connection of its own, to the settings' address alone: no redirects, no proxies."""
        import httpx2

        address = self._settings.address.rstrip("/")
        try:
            with httpx2.Client(
                headers=_headers(self._settings.token_file),
                timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                verify=ssl.create_default_context() if address.startswith("https:") else False,
                follow_redirects=False,
                trust_env=False,
            ) as client:
                answer = client.request(method, f"{address}{path}", json=content)
                if answer.status_code != 200:
                    return Reply(answer.status_code, problem=_problem(answer.status_code, answer.text))
                found = answer.json()
        except httpx2.HTTPError as error:
            return Reply(None, problem=f"{address}: {str(error) or type(error).__name__}"[:TEXT_CHARACTERS])
        except (OSError, ValueError) as error:  # the token's file, an answer that is not JSON
            return Reply(None, problem=str(error)[:TEXT_CHARACTERS])
        if not isinstance(found, dict):
            return Reply(None, problem=f"{address} is no dashboard of Ray")
        return Reply(200, found)


def _headers(token_file: str | None) -> dict[str, str]:
    if token_file is None:
        return {}
    return {"Authorization": f"Bearer {Path(token_file).read_text(encoding='utf-8').strip()}"}


def _turn(submission: Submission) -> int:
    """How often a job has been submitted: 1 for `opd-TICKET`, n for `opd-TICKET-n`."""
    turn = submission.job.split("-")[2:]
    return int(turn[0]) if turn else 1


def _has(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0) >= amount for kind, amount in wanted.items())


def _amount(amount: float, kind: str) -> str:
    """E.g. `8 CPUs`, `1 GPU`."""
    return f"{amount:g} {kind}{'' if amount == 1 or ':' in kind else 's'}"


def _problem(status: int, text: str) -> str:
    """A refusal in a line: the last one of the traceback that the dashboard sends."""
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return f"HTTP status {status}{f': {last}' if last else ''}"[:TEXT_CHARACTERS]


def _cause(found: Mapping[str, Any], message: str) -> str:
    """What Ray tells of an end besides its state; of an entrypoint's output only what is not the entrypoint itself."""
    code = found.get("driver_exit_code")
    if code is None:
        lines = [line for line in message.splitlines() if line.strip() and not line.startswith(("\t", " "))]
        return f" ({' '.join(lines)[:TEXT_CHARACTERS]})" if lines else "."
    last = message.strip().rpartition("\n")[2].strip()
    own = code == 0 or last in str(found.get("entrypoint")) or last.endswith("(truncated to 20,000 chars):")
    return f", exit code {code}{'.' if own else f' ({last[:TEXT_CHARACTERS]})'}"
