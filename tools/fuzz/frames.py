"""Random bad lines on the stdin of a real server: each that asks for an answer gets one, and the server lives on.

    python tools/fuzz/frames.py --lines 20000 --seed 0 --json frames.json

Valid JSON-RPC requests are damaged: bytes flipped, cut and repeated, ids and members of other types, half surrogates,
deep nesting, batches. A ping follows each line; whatever is answered before it belongs to the line. Exits with 1 and
prints the lines that broke a rule, and what the server opened outside of its roots (`opens.py`).
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import EXAMPLE
from tools.fuzz import printed
from tools.fuzz.opens import OpensAudit

METHODS = ("ping", "tools/list", "tools/call", "resources/read", "prompts/get", "completion/complete", "no/such", "")
ODD: list[Any] = [None, True, -1, 1.5, "", "x" * 300, [], {}, {"a": [1]}, "\x00", "\u202e", 2**70, "latest"]
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": "start",
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "fuzz", "version": "1"}},
}


def drawn_line(rng: random.Random) -> bytes:
    """A line of valid or damaged JSON without a line break in it."""
    request: dict[str, Any] = {"jsonrpc": "2.0", "id": rng.choice([7, "seven"]), "method": rng.choice(METHODS)}
    request["params"] = {
        "name": rng.choice(["get_run_status", "list_runs", "inspect_setup", "no_such_tool"]),
        "arguments": {"run_id": "latest"},
        "uri": "opd://runs/latest/log",
    }
    for _ in range(rng.choice((0, 1, 1, 2))):
        target = rng.choice([request, request["params"]]) if isinstance(request.get("params"), dict) else request
        target[rng.choice([*target, "more"])] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(request)
    match rng.randrange(8):
        case 0:
            text = f"[{text}]"
        case 1:
            text = text.replace("latest", rng.choice(["\\ud800", "\\udc00", "\\ud83d\\ud83d"]))
        case 2:
            text = text.replace('"latest"', "[" * rng.choice((50, 300, 5000)) + "1")
        case 3:
            text = text.replace('"latest"', "[" * 5000 + "]" * 5000)
    line = bytearray(text.encode())
    if rng.random() < 0.4:
        place = rng.randrange(len(line))
        match rng.randrange(3):
            case 0:
                line[place] ^= 1 << rng.randrange(8)
            case 1:
                del line[place:]
            case _:
                line[place:place] = line[place : place + 9] * rng.randrange(1, 40)
    return bytes(line).replace(b"\n", b" ")


def asks(line: bytes) -> bool:
    """Whether the line must be answered: all but blank lines, notifications and what looks like an answer."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return bool(line.strip())
    if not isinstance(values, dict) or "method" not in values:
        return not (isinstance(values, dict) and values.keys() & {"result", "error"})
    return "id" in values


class Server:
    """A real server process over a fresh workspace."""

    def __init__(self, folder: Path) -> None:
        self.audit = OpensAudit(folder / "opens")
        environment = {**os.environ, "OPD_HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder)}
        environment |= self.audit.environment()
        command = [sys.executable, "-m", "opd_mcp.cli", "serve"]
        with (folder / "stderr").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        self.pings = 0
        self.answers(json.dumps(INITIALIZE).encode())
        self.answers(b'{"jsonrpc": "2.0", "method": "notifications/initialized"}')

    def answers(self, line: bytes) -> list[dict[str, Any]]:
        """What the server answers to the line; raises EOFError when it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.pings += 1
        ping = {"jsonrpc": "2.0", "id": f"ping-{self.pings}", "method": "ping"}
        self.process.stdin.write(line + b"\n" + json.dumps(ping).encode() + b"\n")
        self.process.stdin.flush()
        found: list[dict[str, Any]] = []
        pinged = False
        # A tool's answer may come after the ping's: requests are served side by side.
        while not pinged or (asks(line) and not found):
            answer = self.process.stdout.readline()
            if not answer:
                raise EOFError("the server has ended")
            message = json.loads(answer)
            if message.get("id") == ping["id"]:
                pinged = True
            elif "method" not in message:
                found.append(message)
        return found


def fuzz(lines: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts by kind of answer, and the lines that broke a rule."""
    rng, server = random.Random(seed), Server(folder)
    kinds: Counter[str] = Counter()
    problems: list[dict[str, str]] = []
    for _ in range(lines):
        line = drawn_line(rng)
        try:
            answers = server.answers(line)
        except (EOFError, OSError, ValueError) as error:
            problems.append({"line": repr(line[:500]), "rule": f"the server lives: {error!r}"})
            break
        for answer in answers:
            kinds[str(answer["error"]["code"]) if "error" in answer else "result"] += 1
            if "internal_error" in json.dumps(answer):
                problems.append({"line": repr(line[:500]), "rule": "an internal error"})
    server.process.kill()
    server.process.wait()
    problems += [{"line": path, "rule": "opened"} for path in server.audit.outside([folder, EXAMPLE])]
    return {"lines": lines, "seed": seed, "answers": dict(sorted(kinds.items())), "problems": problems}


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz(options.lines, options.seed, Path(folder))
    return printed(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
