"""How fast the server is with a thousand runs in its workspace, next to a bare SDK server, over stdio and HTTP.

Run: `python tools/bench/server.py [--json FILE] [--rounds 9] [--runs 1000] [--clients 50] [--seconds 60]`, or with
`--workspace big` for the second list.

- `start_ratio`: seconds to spawn, connect and list tools over stdio, ours / a bare SDK server's, in alternating rounds.
- `stdio_p50_ms`, `http_p50_ms`: median of get_run_status calls by one warm client; `*_bare_p50_ms`: the bare server's
  trivial tool, alternating with ours, to tell a slow machine from a slow server.
- `poll50_p99_ms`, `poll50_errors`: warm HTTP clients that poll and pause for a second; `poll50_bare_*`: the same with
  the bare server, directly afterwards.
- `longest_call_s`: a call that waits its full 25 s for an active run.

With `--workspace big`, over stdio: 5,000 runs, one of them with a million metric lines, and 10,000 artifacts.

- `index_build_s`, `first_status_s`, `first_status_mib`: filling the index from the directories; the first status of the
  long run, whose journal nobody has folded, and the server's peak memory then.
- `list_runs_p50_ms`, `list_artifacts_p50_ms`, `status_p50_ms`: pages of 20 (each third call the next page), the long
  run's status.
- `metrics_s`, `metrics_mib`: metrics of the long run, the slowest of ten calls of a new server, and its peak memory.
- `growth_mib`: what the server's memory grows by between the 1,000th and the 10,000th of these calls.

Prints one line per bar and exits with 1 when one is missed. Times depend on the machine; the ratio hardly does.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import anyio
import psutil
from mcp import Client
from mcp.client.stdio import StdioServerParameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunPhase, RunRecord, RunRequest
from opd_mcp.store.artifacts import ARTIFACT_FILE, ArtifactRecord
from opd_mcp.store.journal import JournalRecord, JournalWriter, RecordType, encode_record, utc_text
from opd_mcp.store.runs import JOURNAL_FILE, RECORD_FILE, RunLock
from opd_mcp.store.series import SERIES_FILE
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
BIG_BARS = {
    "list_runs_p50_ms": 50.0, "list_artifacts_p50_ms": 50.0, "status_p50_ms": 50.0, "metrics_s": 1.0,
    "metrics_mib": 200.0, "first_status_mib": 300.0, "growth_mib": 8.0,
}  # fmt: skip
BIG_RUNS, BIG_ARTIFACTS, BIG_POINTS = 5_000, 10_000, 1_000_000
BIG_CALLS = 10_000
LONG = "lightning-student-long"
SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve"]
ACTIVE = "lightning-student-active"


def record_of(run_id: str, number: int) -> RunRecord:
    """The record of a run that distills nothing."""
    inputs = RunInputs(student=ModelInput(reference="/models/student", path="/models/student"))
    phases = [RunPhase(name="distill", key="k")]
    request = RunRequest(kind="distill", recipe=resolve_recipe("demo", {}), inputs=inputs, phases=phases)
    return RunRecord(
        run_id=run_id,
        created_at=utc_text(1_785_542_400 + number),
        request_hash=str(number),
        request=request,
        versions={},
        hardware="cpu",
    )


def fill(workspace: Workspace, runs: int) -> RunLock:
    """Make finished runs with a hundred metric lines each, and one active run; returns the active run's lock."""
    store = Store(workspace)
    for number in range(runs):
        run_id = ACTIVE if number == runs - 1 else f"lightning-student-{number:06d}"
        lock = store.start_once(record_of(run_id, number)).lock
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


def fill_big(workspace: Workspace) -> None:
    """The files of a big workspace, written at once; its index is built when it is opened."""
    for number in range(BIG_RUNS):
        run_id = LONG if number == BIG_RUNS // 2 else f"lightning-student-{number:06d}"
        directory = workspace.run(run_id)
        directory.mkdir()
        (directory / RECORD_FILE).write_text(record_of(run_id, number).sealed().to_json(indent=2) + "\n")
        with (directory / JOURNAL_FILE).open("wb") as journal:
            for line in journal_lines(BIG_POINTS if run_id == LONG else 3):
                journal.write(line)
    kinds = ("responses", "model", "cache", "model", "report")
    for number in range(BIG_ARTIFACTS):
        kind: ArtifactKind = kinds[number % len(kinds)]  # type: ignore[assignment]
        directory = workspace.artifacts_of(kind) / f"{kind}-{number:06d}"
        directory.mkdir()
        (directory / "content").write_bytes(b"")
        artifact = ArtifactRecord(
            artifact_id=directory.name,
            kind=kind,
            key=str(number),
            run_id=f"lightning-student-{number // 2:06d}",
            created_at=utc_text(1_785_542_400 + number),
            bytes=0,
            files={"content": hashlib.sha256().hexdigest()},
        )
        (directory / ARTIFACT_FILE).write_text(artifact.sealed().to_json(indent=2) + "\n")


def journal_lines(points: int) -> Iterator[bytes]:
    """A run that trained for so many steps and succeeded."""
    events: list[tuple[RecordType, dict[str, Any]]] = [("state", {"state": state}) for state in ("queued", "running")]
    events.append(("phase", {"phase": "distill", "event": "started"}))
    metrics: Iterator[tuple[RecordType, dict[str, Any]]] = (
        ("metric", {"step": step, "values": {"loss": 1 / step + (step * 7919 % 1000) / 1e5}})
        for step in range(1, points + 1)
    )
    for seq, (kind, data) in enumerate(chain(events, metrics, [("state", {"state": "succeeded"})]), start=1):
        yield encode_record(JournalRecord(seq, 1, utc_text(1_785_542_400 + seq / 10), kind, data))


def memory_mib(name: str) -> float:
    """Memory of this process's only child, the server, in MiB: `VmHWM` its peak, `VmRSS` now."""
    [server] = psutil.Process().children()
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 1024


async def seconds_of(client: Client, tool: str, **arguments: Any) -> tuple[float, dict[str, Any]]:
    """How long a call takes, and its answer."""
    start = time.perf_counter()
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    return time.perf_counter() - start, result.structured_content or {}


async def measured_big(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All figures of the big workspace by name."""
    workspace = Workspace(folder / "workspace")
    fill_big(workspace)
    start = time.perf_counter()
    Store(workspace)
    figures = {"runs": float(BIG_RUNS), "artifacts": float(BIG_ARTIFACTS), "points": float(BIG_POINTS)}
    figures["index_build_s"] = time.perf_counter() - start
    (workspace.run(LONG) / SERIES_FILE).unlink()
    environment = {"OPD_HOME": str(workspace.root), "XDG_RUNTIME_DIR": str(folder)}
    server = StdioServerParameters(command=SERVE[0], args=SERVE[1:], env=environment)
    async with Client(server) as client:
        figures["first_status_s"], _ = await seconds_of(client, "get_run_status", run_id=LONG)
        figures["first_status_mib"] = memory_mib("VmHWM")
    async with Client(server) as client:
        calls = [await seconds_of(client, "get_run_metrics", run_ids=[LONG]) for _ in range(10)]
        figures["metrics_s"] = max(seconds for seconds, _ in calls)
        figures["metrics_mib"] = memory_mib("VmHWM")
    times: dict[str, list[float]] = {"list_runs": [], "list_artifacts": [], "status": []}
    async with Client(server) as client:
        cursors: dict[str, dict[str, str]] = {"list_runs": {}, "list_artifacts": {}}
        early = 0.0
        for number in range(arguments.calls):
            name = tuple(times)[number % 3]
            if name == "status":
                seconds, _ = await seconds_of(client, "get_run_status", run_id=LONG)
            else:
                seconds, answer = await seconds_of(client, name, limit=20, **cursors[name])
                following = answer.get("next_cursor") if not cursors[name] else None
                cursors[name] = {"cursor": following} if following else {}
            times[name].append(1000 * seconds)
            if number == arguments.calls // 10:
                early = memory_mib("VmRSS")
        figures["growth_mib"] = memory_mib("VmRSS") - early
    return figures | {f"{name}_p50_ms": statistics.median(values) for name, values in times.items()}


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
    parser.add_argument("--workspace", choices=["thousand", "big"], default="thousand")
    parser.add_argument("--calls", type=int, default=BIG_CALLS, help="with --workspace big")
    arguments = parser.parse_args()
    big = arguments.workspace == "big"
    with tempfile.TemporaryDirectory() as folder:
        if big:
            figures = anyio.run(measured_big, arguments, Path(folder))
        else:
            lock = fill(Workspace(Path(folder) / "workspace"), arguments.runs)
            figures = anyio.run(measured, arguments, Path(folder))
            lock.release()
    bars = BIG_BARS if big else BARS
    missed = {name for name, bar in bars.items() if figures[name] > bar}
    for name, bar in bars.items():
        print(f"{name}: {figures[name]:.3g} (bar {bar:g}){' MISSED' if name in missed else ''}")
    text = json.dumps({k: round(v, 4) for k, v in figures.items()}, indent=2 if arguments.json else None)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
