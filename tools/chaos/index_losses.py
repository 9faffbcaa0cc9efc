"""The index is lost under load: deleted, emptied, damaged or swapped while a server and other processes use it.

A real stdio server starts runs and lists them; two more processes (`contention.py`) start, list, read and publish
on the same workspace. After each loss everything that was acknowledged must be listed, and the same call must give
the same run.
"""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.store.runs import run_ids
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE
from tools.chaos.processes import command
from tools.chaos.workload import Place

CROWD = 2
SECONDS_EACH = 2.0
CALL_SECONDS = 0.15
"""Roughly the length of a start, so that the losses fall within it."""
COMPANIONS = ("", "-wal", "-shm")
PAGE = 100
KINDS = ("deleted", "deleted_alone", "emptied", "damaged", "older", "foreign", "new")


@dataclass
class IndexLosses:
    """How often the index was lost, by kind, and what was lost or made twice with it."""

    kinds: Counter[str] = field(default_factory=Counter)
    answers: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def acknowledged(self) -> set[str]:
        """The runs that the server has answered with."""
        return set(self.answers)


async def lost_indexes(root: Path, seed: int, count: int, tell: Callable[[str], None]) -> IndexLosses:
    """Lose the index `count` times; everything acknowledged must still be listed, and no request run twice."""
    root.mkdir(parents=True)
    place, rng, found = Place(root), random.Random(f"{seed}/index"), IndexLosses()
    program, *words = command("server", place.root, place.plan_file, place.log)
    async with Client(StdioServerParameters(command=program, args=words, env=dict(os.environ))) as client:
        await _started(client, -1, found)
        keep(root / "home" / "opd.sqlite", root / "older")
        crowd = [_hammering(root, f"{seed}/{number}", count * SECONDS_EACH) for number in range(CROWD)]
        try:
            for number in range(count):
                kind = KINDS[number % len(KINDS)] if number < len(KINDS) else rng.choice(KINDS)
                begun = len(found.answers)
                async with anyio.create_task_group() as calls:
                    for _ in range(2):  # two agents that want the same run
                        calls.start_soon(_started, client, number, found)
                    await anyio.sleep(rng.uniform(0, CALL_SECONDS))
                    lose(root, kind, rng)
                found.kinds[kind] += 1
                first, second = found.answers[begun:]
                if first != second:
                    found.wrong.append(f"{kind}: one request is {first} and {second}")
                await _check(client, kind, number, first, found)
                check_directories(place, kind, found)
        finally:
            errors = [error for process in crowd for error in _errors(process, count * SECONDS_EACH)]
        found.wrong += errors
        await _check_listed(client, "the end", set(run_ids(Workspace(root / "home"))), found)
        for row in await _rows(client):
            if row["state"] in ACTIVE_STATES:
                await _answer(client, "cancel_run", run_id=row["run_id"])
    tell(f"index: {dict(sorted(found.kinds.items()))}, {len(found.acknowledged)} runs of the server acknowledged")
    return found


def lose(root: Path, kind: str, rng: random.Random) -> None:
    """Take the index away, or put another in its place."""
    index = root / "home" / "opd.sqlite"
    match kind:
        case "deleted":
            for part in COMPANIONS:
                _companion(index, part).unlink(missing_ok=True)
        case "deleted_alone":
            index.unlink(missing_ok=True)
        case "emptied":
            _replace(index, b"")
        case "damaged":
            _replace(index, rng.randbytes(8192))
        case "older":
            for part in COMPANIONS[1:]:
                _companion(index, part).unlink(missing_ok=True)
            _replace(index, (root / "older").read_bytes())
        case "foreign":
            other = Store(Workspace(root / f"other-{rng.getrandbits(32):08x}"))
            keep(other.workspace.index, root / "foreign")
            _replace(index, (root / "foreign").read_bytes())
            shutil.rmtree(other.workspace.root)
        case _:
            with closing(sqlite3.connect(root / "new")) as database:
                database.execute("CREATE TABLE something (else_ TEXT)")
                database.commit()
            os.replace(root / "new", index)


def keep(index: Path, copy: Path) -> None:
    """A consistent copy of an index as one file."""
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(index)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def check_directories(place: Place, kind: str, found: IndexLosses) -> None:
    """No request has two active runs."""
    store = Store(Workspace(place.root / "home"))

    def twice() -> set[str]:
        active = [run_id for run_id in run_ids(store.workspace) if store.view(run_id).state in ACTIVE_STATES]
        requests = Counter(store.record(run_id).request_hash for run_id in active)
        return {request for request, runs in requests.items() if runs > 1}

    # One run may end and the next begin while they are counted, so only what is found again counts.
    found.wrong += [f"{kind}: two active runs of {request}" for request in (twice() and twice() & twice())]


async def _started(client: Client, number: int, found: IndexLosses) -> None:
    answer = await _answer(client, "sample_model", **_request(number))
    found.answers.append(str(answer["run_id"]))


async def _check(client: Client, kind: str, number: int, first: str, found: IndexLosses) -> None:
    """The same call again gives the same run, and all that was acknowledged is listed."""
    again = await _answer(client, "sample_model", **_request(number))
    if (again["run_id"], again["reused"]) != (first, True):
        found.wrong.append(f"{kind}: the call of {first} gave {again['run_id']}, reused={again['reused']}")
    await _check_listed(client, kind, found.acknowledged, found)
    await _answer(client, "cancel_run", run_id=again["run_id"])


async def _check_listed(client: Client, when: str, expected: set[str], found: IndexLosses) -> None:
    listed = {row["run_id"] for row in await _rows(client)}
    found.wrong += [f"{when}: {run_id} is in no list" for run_id in sorted(expected - listed)]


async def _rows(client: Client) -> list[dict[str, Any]]:
    page = await _answer(client, "list_runs", limit=PAGE)
    rows = page["rows"]
    while page.get("next_cursor"):
        page = await _answer(client, "list_runs", limit=PAGE, cursor=page["next_cursor"])
        rows += page["rows"]
    return list(rows)


async def _answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    if answer.is_error:
        raise RuntimeError(f"{tool}: {answer.content[0].text}")  # type: ignore[union-attr]
    return dict(answer.structured_content or {})


def _request(number: int) -> dict[str, Any]:
    return {"model": str(EXAMPLE / "student"), "prompts": [f"{number % 10}+{abs(number) // 10}=?"], "seed": 7}


def _hammering(root: Path, seed: str, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, str(Path(__file__).with_name("contention.py")), str(root), str(seconds), seed, "cancel"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _errors(process: subprocess.Popen[str], seconds: float) -> list[str]:
    out, err = process.communicate(timeout=seconds + 120)
    if process.returncode:
        return [err[-2000:]]
    return [str(error) for error in json.loads(out.splitlines()[-1])["errors"]]


def _replace(index: Path, content: bytes) -> None:
    other = index.with_name("another")
    other.write_bytes(content)
    os.replace(other, index)


def _companion(path: Path, part: str) -> Path:
    return path.with_name(path.name + part)
