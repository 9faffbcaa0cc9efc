"""Servers that die during start calls: acknowledged runs survive, and repeating the call makes no duplicate."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.store.runs import run_ids
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE
from tools.chaos.failpoints import Moment, Plan
from tools.chaos.processes import command
from tools.chaos.workload import Place

RANDOM = "random_moment"
FAILPOINTS = ("record_write", "file_rename", "index_update", "launch")
MOMENTS: tuple[Moment, ...] = ("before", "torn", "after")
CALL_SECONDS = 0.12
"""Roughly the length of a start, so that random moments fall within it."""
HIT_SECONDS = 2.0
DEADLINE_SECONDS = 60.0


@dataclass
class ServerKills:
    """What the kills of servers led to."""

    kills: Counter[str] = field(default_factory=Counter)
    after_the_calls: int = 0
    acknowledged: set[str] = field(default_factory=set)
    unanswered: int = 0
    wrong: list[str] = field(default_factory=list)


async def killed_servers(place: Place, seed: int, count: int, tell: Callable[[str], None]) -> ServerKills:
    """Kill `count` servers during a start; each next one must show what the previous one acknowledged."""
    place.root.mkdir(parents=True, exist_ok=True)
    rng, found = random.Random(f"{seed}/servers"), ServerKills()
    for number in range(2 * count):  # a server that dies after its answer does not count
        if found.kills.total() == count:
            break
        # Each server checks what the killed one left, and is then killed itself.
        kind = rng.choice((*FAILPOINTS, RANDOM, RANDOM))
        hits = {"index_update": 2, "file_rename": 2, "record_write": 2}.get(kind, 1)
        plan = Plan(kind, rng.randint(1, hits), rng.choice(MOMENTS))
        try:
            await _one_life(place, plan, number, rng, found)
        except* Exception as broken:  # the connection ends with its server
            if not _expected(broken):
                found.wrong.append(f"server {number}: {broken.exceptions[0]!r}")
        _check_directories(place, found)
    async with Client(_server(place)) as client:
        await _check_acknowledged(client, found, sorted(found.acknowledged))
        for row in (await _answer(client, "list_runs", limit=100))["rows"]:
            if row["state"] in ACTIVE_STATES:
                await _answer(client, "cancel_run", run_id=row["run_id"])
    counts = f"{found.kills.total()} kills during calls, {found.after_the_calls} after them"
    tell(f"servers: {counts}, {len(found.acknowledged)} runs acknowledged")
    return found


async def _one_life(place: Place, plan: Plan, number: int, rng: random.Random, found: ServerKills) -> None:
    async with Client(_server(place)) as client:
        pid = _last_pid(place)
        if number:
            await _repeat(client, place, number - 1, found)
        plan.save(place.plan_file)
        found.unanswered = 0
        if plan.kind != RANDOM:
            os.kill(pid, signal.SIGUSR1)
            await _until(lambda: place.log.read_text(encoding="utf-8").endswith(f"{pid} armed\n"))
        async with anyio.create_task_group() as calls:
            for _ in range(2):  # two agents that want the same run
                calls.start_soon(_call, client, place, number, found)
            if plan.kind == RANDOM:
                await anyio.sleep(rng.uniform(0, CALL_SECONDS))
            else:
                with anyio.move_on_after(HIT_SECONDS):
                    await _until(lambda: _hit(place, pid))
            if found.unanswered:
                found.kills[plan.kind if _hit(place, pid) else RANDOM] += 1
            else:
                found.after_the_calls += 1
            os.kill(pid, signal.SIGKILL)  # a zombie by now where it killed itself
            await anyio.sleep(0.05)
            calls.cancel_scope.cancel()


async def _call(client: Client, place: Place, number: int, found: ServerKills) -> None:
    found.unanswered += 1
    try:
        answer = await client.call_tool(*_request(place, number))
    except Exception as error:
        if isinstance(error, ValueError):  # an answer that does not fit its schema; the rest: closed connections
            found.wrong.append(f"call {number}: {error!r}")
        return
    found.unanswered -= 1
    if answer.is_error:
        found.wrong.append(f"call {number}: {answer.content[0].text}")  # type: ignore[union-attr]
        return
    found.acknowledged.add(str((answer.structured_content or {})["run_id"]))


async def _repeat(client: Client, place: Place, number: int, found: ServerKills) -> None:
    """Repeat the call: everything acknowledged is there, and one run does the work."""
    await _check_acknowledged(client, found, sorted(found.acknowledged)[-3:])
    tool, asked = _request(place, number)
    again = await _answer(client, tool, **asked)
    status = await _answer(client, "get_run_status", run_id=again["run_id"])
    if status["state"] not in ACTIVE_STATES:
        found.wrong.append(f"call {number} again: {again['run_id']} is {status['state']}")
    found.acknowledged.add(again["run_id"])
    await _answer(client, "cancel_run", run_id=again["run_id"])


async def _check_acknowledged(client: Client, found: ServerKills, run_ids: list[str]) -> None:
    for run_id in run_ids:
        status = await client.call_tool("get_run_status", {"run_id": run_id})
        state = (status.structured_content or {}).get("state")
        if state not in {*ACTIVE_STATES, "cancelled", "succeeded"}:
            found.wrong.append(f"{run_id} was acknowledged and is {state or 'unknown'}")


def _check_directories(place: Place, found: ServerKills) -> None:
    """No request has two active runs, and every active run is in the list."""
    store = Store(Workspace(place.root / "home"))
    active = [run_id for run_id in run_ids(store.workspace) if store.view(run_id).state in ACTIVE_STATES]
    requests = Counter(store.record(run_id).request_hash for run_id in active)
    found.wrong += [f"{count} active runs of one request" for count in requests.values() if count > 1]
    missing = set(active) - set(store.active_runs())
    # a run may end while the list is made; one that was active before and is after must be in it
    found.wrong += [
        f"{run_id} is active and not in the list" for run_id in missing if store.view(run_id).state in ACTIVE_STATES
    ]


def _request(place: Place, number: int) -> tuple[str, dict[str, Any]]:
    """A call that starts a run, and its arguments; a sample is always of this machine."""
    model = str(EXAMPLE / "student")
    if place.executor is None:
        return "sample_model", {"model": model, "prompts": [f"{number}+1=?"], "seed": number}
    asked = {"model": model, "prompts": str(EXAMPLE / "tune.jsonl"), "preset": "demo", "executor": place.executor}
    return "benchmark_student", {**asked, "overrides": {"runtime.seed": number}}


def _server(place: Place) -> StdioServerParameters:
    program, *words = command("server", place.root, place.plan_file, place.log)
    return StdioServerParameters(command=program, args=words, env=dict(os.environ))


async def _answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    if answer.is_error:
        raise RuntimeError(f"{tool}: {answer.content[0].text}")  # type: ignore[union-attr]
    return dict(answer.structured_content or {})


def _last_pid(place: Place) -> int:
    lines = place.log.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[0]) for line in reversed(lines) if line.endswith(" started"))


def _hit(place: Place, pid: int) -> bool:
    lines = place.log.read_text(encoding="utf-8").splitlines()
    return any(line.startswith(f"{pid} ") and not line.endswith((" started", " armed")) for line in lines)


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the server does not answer")
        await anyio.sleep(0.01)


def _expected(broken: BaseExceptionGroup[Exception]) -> bool:
    """Whether every error is a closed connection."""
    leaves = [error for error in broken.exceptions if not isinstance(error, BaseExceptionGroup)]
    nested = [error for error in broken.exceptions if isinstance(error, BaseExceptionGroup)]
    return all(not isinstance(error, RuntimeError | TimeoutError) for error in leaves) and all(map(_expected, nested))
