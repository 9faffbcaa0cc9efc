"""Random bad tool calls: each must give a valid result or one clear error, and start nothing by mistake.

Run: `python tools/fuzz/tools.py [--calls 20000] [--seed 0] [--json FILE]`. Arguments are drawn from the published
schemas, with existing values for known names, then damaged: dropped, misspelt, of another type, out of range, not
finite, hostile paths, text in place of JSON. Calls go through a real SDK client and the real JobService over a
temporary workspace; only the launch of worker processes is replaced, by a counter. Exits with 1 and prints the calls
that broke a rule.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
from mcp import Client

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.devices.settings import JobSettings
from opd_mcp.server.app import build_server
from opd_mcp.server.serve import ServerSettings
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from opd_mcp.supervisor import launch
from tools import EXAMPLE
from tools.fuzz import printed

TEXT_BUDGET = 8_000
"""Characters of an answer: about 2k tokens."""
ERROR_BUDGET = 2_000
ODD = [
    None, True, False, 0, -1, 2**63, 1e308, float("nan"), float("inf"), "", " ", "latest", "null", "[]", "{}", "[1",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "a" * 5000, "\x00", "ünïcödé 漢字", "'; DROP TABLE runs; --",
    [], [[]], [None], ["x"] * 300, {}, {"a": {"b": [1]}}, {"__proto__": 1}, "{\"distill.steps\": 1e999}", "org/name",
]  # fmt: skip


class Fuzzer:
    """Draws calls for a server's tools; the same seed draws the same calls."""

    def __init__(self, tools: list[Any], seed: int) -> None:
        self.random = random.Random(seed)
        self.schemas = {tool.name: tool.input_schema for tool in tools}
        self.ids: dict[str, list[str]] = {"run": ["latest"], "plan": ["plan-x"], "artifact": ["model-x"]}

    def call(self) -> tuple[str, dict[str, Any]]:
        """A tool and its arguments, damaged more often than not."""
        tool = self.random.choice(list(self.schemas))
        schema = self.schemas[tool]
        required = set(schema.get("required", ()))
        names = [name for name in schema["properties"] if name in required or self.random.random() < 0.3]
        arguments = {name: self.value(name, schema["properties"][name]) for name in names}
        for _ in range(self.random.choice((0, 0, 1, 1, 2))):
            self.damage(arguments, schema)
        return tool, arguments

    def value(self, name: str, schema: dict[str, Any]) -> Any:
        """A value that fits the schema, and for known names one that exists."""
        pick = self.random.choice
        known: dict[str, list[Any]] = {
            "teacher": [str(EXAMPLE / "teacher"), str(EXAMPLE / "teacher_other_style")],
            "student": [str(EXAMPLE / "student")],
            "model": [str(EXAMPLE / "student"), *self.ids["artifact"]],
            "prompts": [["1+1=?"], str(EXAMPLE / "tune.jsonl")],
            "sft_prompts": [["1+1=?"]],
            "eval_prompts": [str(EXAMPLE / "tune.jsonl")],
            "run_id": self.ids["run"],
            "run_ids": [[pick(self.ids["run"])]],
            "plan_id": self.ids["plan"],
            "artifact_id": self.ids["artifact"],
            "cache_id": self.ids["artifact"],
            "confirm": [*self.ids["plan"], *self.ids["artifact"]],
            "overrides": [{}, {"distill.steps": 3}, {"runtime.seed": 1}, {"distill.stepz": 3}, {"sft.steps": -1}],
            "preset": ["demo", "demo", "quick"],
            "wait_seconds": [0, 0.01],
        }
        if name in known and self.random.random() < 0.9:
            return copy.deepcopy(pick(known[name]))
        if "enum" in schema:
            return pick(schema["enum"])
        kind = schema.get("type") or pick(schema["anyOf"])["type"]
        kind = pick(kind) if isinstance(kind, list) else kind
        if kind in ("integer", "number"):
            return self.random.randint(schema.get("minimum", 0), min(schema.get("maximum", 50), 100))
        drawn = {"boolean": pick([True, False]), "array": [pick(["x", "1+1=?"])], "object": {}}
        return drawn.get(kind, pick(["text", "x y", "model-1"]))

    def damage(self, arguments: dict[str, Any], schema: dict[str, Any]) -> None:
        """Damage the arguments in one way, in place."""
        name = self.random.choice(list(schema["properties"]) or ["x"])
        match self.random.randrange(5):
            case 0:
                arguments.pop(name, None)
            case 1:
                arguments[name[:-1] or "z"] = arguments.pop(name, 1)
            case 2 if isinstance(arguments.get(name), list | dict):
                arguments[name] = json.dumps(arguments[name])
            case 3 if isinstance(arguments.get(name), list):
                arguments[name] = [*arguments[name], self.random.choice(ODD)]
            case _:
                # A long wait is valid and would only take time.
                arguments[name] = (
                    self.random.choice(ODD) if name != "wait_seconds" else self.random.choice([-1, 26, "x"])
                )

    def learn(self, content: dict[str, Any]) -> None:
        """Use ids of an answer in later calls."""
        for kind, key in (("run", "run_id"), ("plan", "plan_id"), ("artifact", "cache_id")):
            if isinstance(content.get(key), str):
                self.ids[kind] = [*self.ids[kind], content[key]][-8:]


def broken_rules(tool: str, result: Any, launched: int) -> list[str]:
    """The rules that one answer breaks; the call started `launched` workers."""
    text = "\n".join(part.text for part in result.content)
    if result.is_error:
        rules = {
            "an error started a run": launched == 0,
            "an error without code or fix": "[" in text and "Fix: " in text,
            "an error over its budget": len(text) <= ERROR_BUDGET,
            "an internal error": "[internal_error]" not in text,
            "a traceback": "Traceback" not in text,
        }
    else:
        content = json.dumps(result.structured_content, allow_nan=True)
        rules = {
            "a text over its budget": len(text) <= TEXT_BUDGET,
            "a number that JSON does not have": "NaN" not in content and "Infinity" not in content,
            "more than one run by one call": launched <= 1,
        }
    return [f"{tool}: {rule}" for rule, holds in rules.items() if not holds]


async def fuzz(calls: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts by outcome, and the calls that broke a rule."""
    launched: list[str] = []

    def count(workspace: Any, lock: Any, settings: Any) -> Any:
        launched.append(lock.directory.name)
        lock.release()
        return FinishedWorker()

    launch.launch_worker = count
    settings = JobSettings(lease_folder=folder / "leases")
    service = JobService(Workspace(folder / "workspace"), AllowedRoots([]), settings)
    outcomes: Counter[str] = Counter()
    problems: list[dict[str, Any]] = []
    slowest = 0.0
    async with Client(build_server(service, ServerSettings(gpu_hours=0.01, allow_delete=True))) as client:
        fuzzer = Fuzzer((await client.list_tools()).tools, seed)
        for _ in range(calls):
            tool, arguments = fuzzer.call()
            before, start = len(launched), time.perf_counter()
            try:
                # The client checks every structured answer against the published schema.
                result = await client.call_tool(tool, arguments)
            except Exception as error:  # any exception here is a finding
                problems.append({"tool": tool, "arguments": repr(arguments)[:500], "rules": [repr(error)[:500]]})
                continue
            slowest = max(slowest, time.perf_counter() - start)
            if rules := broken_rules(tool, result, len(launched) - before):
                told = "\n".join(part.text for part in result.content)[:600]
                problems.append({"tool": tool, "arguments": repr(arguments)[:500], "rules": rules, "text": told})
            outcomes["error" if result.is_error else "result"] += 1
            if not result.is_error:
                fuzzer.learn(result.structured_content or {})
    return {
        "calls": calls,
        "seed": seed,
        "results": outcomes["result"],
        "errors": outcomes["error"],
        "runs_started": len(launched),
        "slowest_call_s": round(slowest, 3),
        "problems": problems,
    }


class FinishedWorker:
    """Stands for a worker process that has already ended."""

    returncode = 0

    def poll(self) -> int:
        """The exit status."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status."""
        return self.returncode


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = anyio.run(fuzz, arguments.calls, arguments.seed, Path(folder))
    return printed(report, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
