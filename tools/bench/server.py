"""How fast the server is with a thousand runs in its workspace, next to a bare SDK server, over stdio and HTTP.

Run: `python tools/bench/server.py [--json FILE] [--rounds 9] [--runs 1000] [--clients 50] [--seconds 60]`.

- `start_ratio`: seconds to spawn, connect and list tools over stdio, ours / a bare SDK server's, in alternating rounds.
- `stdio_p50_ms`, `http_p50_ms`: median of get_run_status calls by one warm client; `*_bare_p50_ms`: the bare server's
  trivial tool, alternating with ours, to tell a slow machine from a slow server.
- `poll50_p99_ms`, `poll50_errors`: warm HTTP clients that poll and pause for a second; `poll50_bare_*`: the same with
  the bare server, directly afterwards.
- `longest_call_s`: a call that waits its full 25 s for an active run.

Prints one line per bar and exits with 1 when one is missed. Times depend on the machine; the ratio hardly does.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunPhase, RunRecord, RunRequest
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import JOURNAL_FILE, RunLock
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace

BARE = """
import sys
from mcp.server import MCPServer
server = MCPServer("bare", log_level="WARNING")
@server.tool()
def add(a: int, b: int) -> int:
    return a + b
if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run("stdio")
"""
BARS = {
    "start_ratio": 1.5, "stdio_p50_ms": 5.0, "http_p50_ms": 10.0, "poll50_p99_ms": 250.0, "poll50_errors": 0,
    "longest_call_s": 25.0,
}  # fmt: skip
SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve"]
ACTIVE = "lightning-student-active"


def fill(workspace: Workspace, runs: int) -> RunLock:
    """Make finished runs with a hundred metric lines each, and one active run; returns the active run's lock."""
    store = Store(workspace)
    recipe = resolve_recipe("demo", {})
    for number in range(runs):
        run_id = ACTIVE if number == runs - 1 else f"lightning-student-{number:06d}"
        inputs = RunInputs(student=ModelInput(reference="/models/student", path="/models/student"))
        request = RunRequest(kind="distill", recipe=recipe, inputs=inputs, phases=[RunPhase(name="distill", key="k")])
        created = f"2026-08-01T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000Z"
        record = RunRecord(
            run_id=run_id, created_at=created, request_hash=str(number), request=request, versions={}, hardware="cpu"
        )
        lock = store.start_once(record).lock
        assert lock is not None
        with JournalWriter(workspace.run(run_id) / JOURNAL_FILE, attempt=1) as journal:
            journal.append("state", {"state": "running"}, durable=False)
            journal.append("phase", {"phase": "distill", "event": "started"}, durable=False)
            for step in range(100):
                journal.append("metric", {"step": step, "values": {"loss": 1 / (step + 1)}}, durable=False)
            if run_id != ACTIVE:
                journal.append("state", {"state": "succeeded"}, durable=False)
                lock.release()
    return lock


async def seconds_to_list(server: StdioServerParameters) -> float:
    """Seconds from spawning the server to holding its list of tools."""
    start = time.perf_counter()
    async with Client(server) as client:
        await client.list_tools()
        return time.perf_counter() - start


async def start_ratio(ours: StdioServerParameters, bare: StdioServerParameters, rounds: int) -> dict[str, float]:
    """Medians and their ratio; one unmeasured round of each comes first (file caches)."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(rounds + 1):
        for name, server in (("bare", bare), ("ours", ours)):
            seconds = await seconds_to_list(server)
            if number:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "start_ours_s": medians["ours"],
        "start_bare_s": medians["bare"],
        "start_ratio": medians["ours"] / medians["bare"],
    }


async def call_medians(ours: Any, bare: Any, name: str, calls: int = 200) -> dict[str, float]:
    """Medians in milliseconds of a status call and of the bare server's tool, alternating."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    async with Client(ours) as client, Client(bare) as other:
        await client.list_tools()
        await other.list_tools()
        for number in range(calls + 20):
            for key, connected, tool, arguments in (
                ("ours", client, "get_run_status", {"run_id": ACTIVE}),
                ("bare", other, "add", {"a": 1, "b": 2}),
            ):
                start = time.perf_counter()
                result = await connected.call_tool(tool, arguments)
                if number >= 20:
                    times[key].append(1000 * (time.perf_counter() - start))
                assert not result.is_error, result
    return {f"{name}_p50_ms": statistics.median(times["ours"]), f"{name}_bare_p50_ms": statistics.median(times["bare"])}


async def polling(
    url: str, clients: int, seconds: float, name: str, tool: str, arguments: dict[str, Any]
) -> dict[str, float]:
    """Latency in milliseconds of many warm clients that pause for a second between polls."""
    times: list[float] = []
    errors = warm = 0
    all_warm = anyio.Event()

    async def poll(number: int) -> None:
        nonlocal errors, warm
        async with Client(url) as client:
            await client.call_tool(tool, arguments)
            warm += 1
            if warm == clients:
                all_warm.set()
            await all_warm.wait()
            await anyio.sleep(number / clients)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                result = await client.call_tool(tool, arguments)
                times.append(1000 * (time.perf_counter() - start))
                errors += bool(result.is_error)
                await anyio.sleep(1)

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(poll, number)
    ordered = sorted(times)
    return {
        f"{name}_calls": len(times),
        f"{name}_errors": errors,
        f"{name}_p50_ms": statistics.median(ordered),
        f"{name}_p99_ms": ordered[int(len(ordered) * 0.99)],
    }


async def longest_wait(url: str) -> dict[str, float]:
    """Seconds of a call that waits as long as it may."""
    async with Client(url) as client:
        start = time.perf_counter()
        await client.call_tool("get_run_status", {"run_id": ACTIVE, "wait_seconds": 25})
        return {"longest_call_s": time.perf_counter() - start}


@asynccontextmanager
async def served(command: list[str], environment: dict[str, str]) -> AsyncIterator[str]:
    """The URL of an HTTP server process; a free port replaces PORT in its command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    process = subprocess.Popen(words, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        with anyio.fail_after(60):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    await anyio.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        process.wait(timeout=20)


async def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All figures by name."""
    script = folder / "bare.py"
    script.write_text(BARE, encoding="utf-8")
    environment = {"OPD_HOME": str(folder / "workspace"), "XDG_RUNTIME_DIR": str(folder)}
    ours = StdioServerParameters(command=SERVE[0], args=SERVE[1:], env=environment)
    bare = StdioServerParameters(command=sys.executable, args=[str(script)])
    figures = {"runs": float(arguments.runs), **await start_ratio(ours, bare, arguments.rounds)}
    figures |= await call_medians(ours, bare, "stdio")
    http = [*SERVE, "--transport", "http", "--port", "PORT", "--no-token"]
    async with served(http, environment) as url, served([sys.executable, str(script), "PORT"], {}) as other:
        figures |= await call_medians(url, other, "http")
        load = arguments.clients, arguments.seconds
        figures |= await polling(url, *load, "poll50", "get_run_status", {"run_id": ACTIVE})
        figures |= await polling(other, *load, "poll50_bare", "add", {"a": 1, "b": 2})
        figures |= await longest_wait(url)
    return figures


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lock = fill(Workspace(Path(folder) / "workspace"), arguments.runs)
        figures = anyio.run(measured, arguments, Path(folder))
        lock.release()
    missed = {name for name, bar in BARS.items() if figures[name] > bar}
    for name, bar in BARS.items():
        print(f"{name}: {figures[name]:.3g} (bar {bar:g}){' MISSED' if name in missed else ''}")
    if arguments.json:
        arguments.json.write_text(json.dumps({k: round(v, 4) for k, v in figures.items()}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
