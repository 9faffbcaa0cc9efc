"""Which files and functions a start and a status pass through, and how often they plan, read and connect.

    python tools/docs/journeys.py --json journeys.json

A fresh workspace, the arithmetic example, the real server spoken to by a client in the same process, real workers. The
start is `start_distillation` with the arguments of a plan, from the tool call until its worker is launched; the status
is one `get_run_status` after it. Counted: files of opd_mcp with a function that was entered, those functions, plans
made, the most reads of one prompt file, and SQLite connections opened.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
from mcp import Client

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import opd_mcp
from opd_mcp.devices.settings import JobSettings
from opd_mcp.server.app import build_server
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE

PACKAGE = str(Path(opd_mcp.__file__).parent)


class Journey:
    """What was entered between two moments, in all threads."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.calls: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.connections = 0
        self.over = False

    def enter(self, frame: FrameType, event: str) -> None:
        """A function begins."""
        code = frame.f_code
        if event != "call" or self.over or not code.co_filename.startswith(PACKAGE) or code.co_name == "<module>":
            return
        if code.co_filename.endswith("/server/resources.py"):
            return  # the loop that watches runs for subscribers, whatever is called meanwhile
        name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
        self.functions.add((code.co_filename.removeprefix(PACKAGE + "/"), name.split(".<locals>")[0]))
        self.calls[f"{Path(code.co_filename).stem}.{name}"] += 1
        if name == "launch_worker":
            self.over = True

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: a file is opened, or a database is."""
        if self.over:
            return
        if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".jsonl"):
            self.opened[arguments[0]] += 1
        if event == "sqlite3.connect":
            self.connections += 1

    @property
    def files(self) -> list[str]:
        """The files, sorted."""
        return sorted({file for file, _ in self.functions})


current: list[Journey] = []


def enter(frame: FrameType, event: str, argument: Any) -> None:
    """The profiler of every thread of this process: tells the journey that is under way, if any."""
    if current:
        current[-1].enter(frame, event)


def listen() -> None:
    """Hear of every function and every opened file from now on; before any thread that counts has begun."""
    sys.addaudithook(lambda event, arguments: current[-1].heard(event, arguments) if current else None)
    threading.setprofile(enter)
    sys.setprofile(enter)


@contextmanager
def traced() -> Iterator[Journey]:
    """A journey over the block, in all threads."""
    journey = Journey()
    current.append(journey)
    try:
        yield journey
    finally:
        current.pop()


async def journeys(root: Path) -> tuple[Journey, Journey]:
    """The journeys of a start and of a status call."""
    settings = JobSettings(lease_folder=root / "leases", cpu_slots=2)
    service = JobService(Workspace(root / "home"), AllowedRoots([EXAMPLE]), settings)
    arguments = {
        **{name: str(EXAMPLE / name) for name in ("student", "teacher")},
        **{f"{role}prompts": str(EXAMPLE / f"{file}.jsonl") for role, file in (("", "opd"), ("sft_", "sft"))},
        "eval_prompts": str(EXAMPLE / "eval.jsonl"),
        "preset": "demo",
        "overrides": {"sft.steps": 1, "distill.steps": 1},
    }
    async with Client(build_server(service)) as client:
        with traced() as start:
            answer = await client.call_tool("start_distillation", arguments)
        assert not answer.is_error, answer.content
        run_id = answer.structured_content["run_id"]
        with traced() as status:
            answer = await client.call_tool("get_run_status", {"run_id": run_id})
        assert answer.structured_content["run_id"] == run_id
        await client.call_tool("cancel_run", {"run_id": run_id})
        while (await client.call_tool("get_run_status", {"run_id": run_id, "wait_seconds": 5})).structured_content[
            "state"
        ] in ("queued", "running"):
            pass
    return start, status


def counted(start: Journey, status: Journey) -> dict[str, dict[str, int]]:
    """The figures of both journeys."""
    return {
        "start": {
            "files": len(start.files),
            "functions": len(start.functions),
            "plans": start.calls["planner.Planner.plan"] or start.calls["planner.plan"],
            "prompt_reads": max((count for path, count in start.opened.items() if "arithmetic" in path), default=0),
            "sqlite_connections": start.connections,
        },
        "status": {"files": len(status.files), "functions": len(status.functions)},
    }


def main() -> None:
    """Trace both journeys and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--list", action="store_true", help="print the files of each journey")
    options = parser.parse_args()
    listen()
    with tempfile.TemporaryDirectory() as folder:
        start, status = anyio.run(journeys, Path(folder))
    figures = counted(start, status)
    if options.list:
        for name, journey in (("start", start), ("status", status)):
            print(name)
            for file in journey.files:
                names = sorted(function for other, function in journey.functions if other == file)
                print(f"  {file}: {', '.join(names)}")
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
