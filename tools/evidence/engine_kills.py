"""Teacher caches that a managed engine makes while its API server, a core or the worker is killed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from opd_mcp.schemas.requests import BuildTeacherCache
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.worker.engines import marked
from tools.evidence.engine_place import RUN_SECONDS, Place, Runs, starts

GONE_SECONDS = 60.0
START_PAUSE_SECONDS = 20.0
KILLS_PER_BUILD = 5
ROLES = ("server", "core", "worker")
KILLED = {"rollout.count": 256, "rollout.shard_rows": 16, "rollout.batch_size": 16, "score.concurrency": 8}


def kills(place: Place, points: int) -> None:
    """Builds with kills until there are so many of each role; noted one by one."""
    if "whole" not in place.known():
        runs = Runs(place, "whole")
        status = runs.ended(build(place, runs))
        place.note("whole", str(cache_of(status)) if status.result else str(status.error))
    for number in range(2 * points):
        for role in ROLES:
            done = [trial for trial in place.known().get("kills", []) if trial["killed"] == role]
            if len(done) < points:
                killed_build(place, role, number, min(points - len(done), KILLS_PER_BUILD))


def build(place: Place, runs: Runs) -> str:
    """A teacher cache of the flow's SFT student, on the engine; the run's id."""
    arguments = BuildTeacherCache(
        teacher=str(place.model("teacher")),
        student=place.known()["flow"]["sft"],
        prompts=place.prompts("opd"),
        declared_teacher=str(place.model("teacher")),
        preset=place.task_of().arguments["preset"],
        overrides=place.settings(KILLED) | place.on_engine("rollout", "score"),
    )
    return runs.service.build_teacher_cache(arguments).run_id


def cache_of(status: RunStatus) -> Path:
    """A finished build's cache."""
    assert status.result is not None
    return Path(status.result["paths"]["cache"])


def killed_build(place: Place, role: str, number: int, points: int) -> None:
    """One build in which a role is killed up to so many times, the first while it starts, and what came of it."""
    runs = Runs(place, f"{role}-{number}-{int(time.time())}", restarts=points + 3)
    run_id = build(place, runs)
    run, rows = runs.run_of(run_id), place.settings(KILLED)["rollout.count"]
    chance = random.Random(f"{role}-{number}")
    moments = [0, *sorted(chance.sample(range(1, 2 * rows), points - 1))]
    reached, trials = 0, list[dict[str, Any]]()
    for moment in moments:
        # A later moment may have gone by while the engine started again: then the next row is as good.
        found = reached_moment(runs, run_id, role, max(moment, reached + 1) if moment else 0)
        if found is None:
            break
        reached, victims = found
        if not moment:
            time.sleep(chance.uniform(0, START_PAUSE_SECONDS))
            victims = processes(run, run_id)[role] or victims
        victim = chance.choice(victims)
        before = marked(run)
        name = title(victim)[:40]
        with_death(victim)
        left = outlived(before)
        trials.append({"killed": role, "process": name, "after_rows": reached, "left_over": left})
        place.note("kills", [*place.known().get("kills", []), trials[-1]])
        if role == "worker":
            while runs.service.status(run_id).state in ACTIVE_STATES:
                time.sleep(0.2)
            runs.service.resume(run_id)
    status = runs.ended(run_id)
    if status.state == "failed":
        runs.service.resume(run_id)
        status = runs.ended(run_id)
    outcome = {"role": role, "kills": len(trials), "state": status.state, "starts": starts(run)}
    outcome |= {"left_over": len(marked(run))}
    if status.result is not None:
        outcome |= agreement(Path(place.known()["whole"]), cache_of(status))
    else:
        outcome |= {"error": str(status.error)}
    place.note("builds", [*place.known().get("builds", []), outcome])


def reached_moment(runs: Runs, run_id: str, role: str, rows: int) -> tuple[int, list[int]] | None:
    """Wait until so many rows are drawn or scored and the role lives: rows and processes; None if the run ended."""
    run, half = runs.run_of(run_id), 0
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        status = runs.service.status(run_id)
        if status.state == "failed" and status.error is not None and status.error.code == "engine_failed":
            runs.service.resume(run_id)  # as the error says
            continue
        if status.state not in ACTIVE_STATES:
            return None
        if status.phase == "score":
            half = status.progress.total if status.progress else half
        done = status.progress.done if status.progress and status.phase in ("rollout", "score") else 0
        done += half if status.phase == "score" else 0
        victims = processes(run, run_id).get(role, [])
        if done >= rows and victims:
            return done, victims
        time.sleep(0.05)
    return None


def with_death(pid: int) -> None:
    """Kill a process at once."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def outlived(before: list[int]) -> int:
    """How many of these processes live a minute later; it waits no longer than until there is none."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := [pid for pid in before if psutil.pid_exists(pid) and not _zombie(pid)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.2)
    return len(left)


def _zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def agreement(whole: Path, other: Path) -> dict[str, Any]:
    """Whether two caches hold the same: to the bit, else the same ids, and how far log-probs are apart."""
    from opd_mcp.engine.cache.manifest import read_cache

    (first, ours), (second, theirs) = read_cache(whole), read_cache(other)
    same = np.array_equal(ours.response_ids, theirs.response_ids)
    found: dict[str, Any] = {"same_content": first.content_sha256 == second.content_sha256, "same_ids": bool(same)}
    if same:
        for column in ("behaviour_logprobs", "teacher_logprobs"):
            found[column] = float(np.abs(ours.columns[column] - theirs.columns[column]).max())
    return found


def processes(run: Path, run_id: str) -> dict[str, list[int]]:
    """The living processes of a run by role: the worker, and of its engine the API server and what this started."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and run_id in words:
            found["worker"].append(process.pid)
    for pid in marked(run):
        words = title(pid).split()
        if any(word.endswith("worker/engines.py") for word in words) or not words:
            continue  # the keeper
        if "--served-model-name" in words:
            found["server"].append(pid)
        elif "resource_tracker" not in title(pid):
            found["core"].append(pid)
    return found


def title(pid: int) -> str:
    """What a process calls itself; empty once it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
