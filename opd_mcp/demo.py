"""The demo: a real client drives a real server over stdio through the whole method on the embedded task.

It uses nothing but the tools that any agent sees. Runs take both cores where there are two, one thread each; an
identical earlier stage (responses, SFT, teacher cache) is reused by content, never computed twice.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import RunError

FINAL_STATES = ("succeeded", "failed", "cancelled", "lost")
SHORT_STEPS = {"distill.steps": 200}
# four times the batch, so that few steps end alike whatever the seed: chosen on tune.jsonl (docs/results.md)
TOPK_STEPS = SHORT_STEPS | {"distill.batch_size": 256}
ARMS = (
    "base",
    "sft",
    "lightning_sampled",
    "lightning_topk",
    "live",
    "teacher",
    "sft_other_style",
    "lightning_other_style",
)


class Arm(Schema):
    """One row of the table; `seconds` is the training loop, `seconds_total` adds its rollouts and scoring."""

    accuracy: float
    accuracy_ci: tuple[float, float]
    reverse_kl: float
    steps: int
    seconds: float
    seconds_per_step: float | None = None
    seconds_total: float


class Guard(Schema):
    """What the server said to a distillation from a teacher that is not the SFT teacher."""

    refused: bool
    message: str


class DemoResult(Schema):
    """The file that `--json` writes."""

    arms: dict[str, Arm]
    consistency_guard: Guard
    wall_seconds: float
    seed: int


def run_demo(seed: int, json_path: Path | None, workspace: Path, *, overrides: Mapping[str, Any] | None = None) -> None:
    """Run the demo in a new workspace below `workspace`, print the table, and write `json_path` if given.

    `overrides` change the recipe of every arm; with them the numbers are no longer the demo's.
    """
    home = workspace / "demos" / f"seed-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console()
    console.width = max(console.width, 100)
    result = anyio.run(_demo, seed, home, console, dict(overrides or {}))
    console.print(_table(result))
    console.print(f"Consistency guard: {'refused' if result.consistency_guard.refused else 'NOT REFUSED'}.")
    console.print(result.consistency_guard.message, markup=False, highlight=False)
    console.print(f"{result.wall_seconds:.0f} s in all. Everything it made is in {home}", markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


async def _demo(seed: int, home: Path, console: Console, changes: dict[str, Any]) -> DemoResult:
    started = time.perf_counter()
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "opd_mcp.cli", "serve"], env={**os.environ, "OPD_HOME": str(home)}
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        async with Client(server) as client:
            session = _Session(client, {"runtime.seed": seed} | changes, progress, console)
            arms, guard = await session.all_arms()
    return DemoResult(
        arms={name: arms[name] for name in ARMS},
        consistency_guard=guard,
        wall_seconds=time.perf_counter() - started,
        seed=seed,
    )


class _Session:
    """One client's way through the demo."""

    def __init__(self, client: Client, changes: dict[str, Any], progress: Progress, console: Console) -> None:
        self._client, self._changes, self._progress, self._console = client, changes, progress, console
        self._results: dict[str, dict[str, Any]] = {}

    async def all_arms(self) -> tuple[dict[str, Arm], Guard]:
        """Every arm's row, and the guard's answer."""
        example = (await self._call("inspect_setup"))["example"]
        task = {
            "student": example["student"],
            "teacher": example["teacher"],
            "prompts": example["prompts_opd"],
            "sft_prompts": example["prompts_sft"],
            "benchmark": False,
        }
        sft_done, cache_done, guards = anyio.Event(), anyio.Event(), []

        async def lightning() -> None:
            plan = await self._call("plan_distillation", **self._with_preset(_without(task, "benchmark")))
            self._console.print(f"plan {plan['plan_id']}: {', '.join(phase['name'] for phase in plan['phases'])}")
            await self._run("lightning_sampled", task, {"sft": sft_done, "score": cache_done})

        async def live() -> None:
            await sft_done.wait()
            await self._run("live", task | {"method": "live", "overrides": SHORT_STEPS})

        async def topk() -> None:
            await cache_done.wait()
            await self._run("lightning_topk", task | {"estimator": "topk_reverse_kl", "overrides": TOPK_STEPS})

        async def other_style() -> None:
            other = task | {"teacher": example["teacher_other_style"], "method": "sft"}
            await self._run("sft_other_style", other)
            student = self._results["sft_other_style"]["artifacts"]["sft"]
            mismatched = _without(task, "sft_prompts") | {"student": student, "overrides": SHORT_STEPS}
            guards.append(await self._guard(mismatched))
            allowed = mismatched | {"allow_teacher_mismatch": True}
            # This client has no user to ask, so it names the plan that a user would agree to.
            plan = await self._call("plan_distillation", **self._with_preset(_without(allowed, "benchmark")))
            await self._run("lightning_other_style", allowed | {"confirm": plan["plan_id"]})

        async with anyio.create_task_group() as tasks:
            for arm in (lightning, other_style, live, topk):
                tasks.start_soon(arm)
        return self._rows(await self._scores(example)), guards[0]

    async def _guard(self, arguments: dict[str, Any]) -> Guard:
        answer = await self._client.call_tool("start_distillation", self._with_preset(arguments))
        return Guard(refused=bool(answer.is_error), message=_text(answer))

    async def _scores(self, example: dict[str, str]) -> dict[str, dict[str, Any]]:
        models = {
            "base": example["student"],
            "teacher": example["teacher"],
            "sft": self._made("lightning_sampled", "sft"),
            "sft_other_style": self._made("sft_other_style", "sft"),
            **{name: self._made(name, "model") for name in self._results if name != "sft_other_style"},
        }
        scores: dict[str, dict[str, Any]] = {}

        async def measure(number: int, names: Sequence[str]) -> None:
            first, *others = [models[name] for name in names]
            # The teacher is an arm of its own, measured once.
            arguments = {
                "overrides": {"benchmark.references": []},
                "model": first,
                "baselines": others,
                "prompts": example["prompts_eval"],
                "teacher": example["teacher"],
            }
            result = await self._follow(f"benchmark {number}", await self._start("benchmark_student", arguments), {})
            scores.update(zip(names, result["scores"].values(), strict=True))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(measure, 1, ["lightning_sampled", "sft", "base", "teacher"])
            tasks.start_soon(measure, 2, ["lightning_topk", "live", "lightning_other_style", "sft_other_style"])
        return scores

    def _rows(self, scores: dict[str, dict[str, Any]]) -> dict[str, Arm]:
        rows = {}
        for name, score in scores.items():
            source = "lightning_sampled" if name == "sft" else name
            result, stage = self._results.get(source, {}), "sft" if name.startswith("sft") else "distill"
            training = result.get("training", {}).get(stage, {"steps": 0, "seconds": 0.0})
            data_stages = ("generate_responses",) if stage == "sft" else ("rollout", "score")
            data_seconds = sum(c["seconds"] for c in result.get("costs", []) if c["stage"] in data_stages)
            accuracy, low, high = score["greedy_accuracy"]
            rows[name] = Arm(
                accuracy=accuracy,
                accuracy_ci=(low, high),
                reverse_kl=score["reverse_kl"][0],
                steps=training["steps"],
                seconds=training["seconds"],
                seconds_per_step=training.get("seconds_per_step"),
                seconds_total=training["seconds"] + data_seconds,
            )
        return rows

    def _made(self, arm: str, role: str) -> str:
        return str(self._results[arm]["artifacts"][role])

    async def _run(self, arm: str, arguments: dict[str, Any], reached: dict[str, anyio.Event] | None = None) -> None:
        run_id = await self._start("start_distillation", arguments)
        self._results[arm] = await self._follow(arm, run_id, reached or {})

    async def _start(self, tool: str, arguments: dict[str, Any]) -> str:
        return str((await self._call(tool, **self._with_preset(arguments)))["run_id"])

    async def _follow(self, label: str, run_id: str, reached: dict[str, anyio.Event]) -> dict[str, Any]:
        bar, shown = self._progress.add_task(label, total=1), ""
        while True:
            status = await self._call("get_run_status", run_id=run_id, wait_seconds=2)
            for phase, event in reached.items():
                if phase in status.get("phases_done", []):
                    event.set()
            phase = status.get("phase", status["state"])
            done = status.get("progress", {"done": 0, "total": 1})
            self._progress.update(bar, description=f"{label}: {phase}", completed=done["done"] / done["total"])
            if phase != shown and not self._console.is_terminal:
                self._console.print(f"{label}: {phase}")
            shown = phase
            if status["state"] in FINAL_STATES:
                break
        self._progress.remove_task(bar)
        if status["state"] != "succeeded":
            error = status.get("error", {})
            raise RunError(
                "launch_failed",
                f"{label} ended as {status['state']}: {error.get('cause')}",
                value=run_id,
                fix=error.get("fix", ""),
            )
        return dict(status["result"])

    async def _call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        answer = await self._client.call_tool(tool, arguments)
        if answer.is_error:
            raise RunError("launch_failed", f"{tool}: {_text(answer)}", fix="Report this with the demo's workspace.")
        return dict(answer.structured_content or {})

    def _with_preset(self, arguments: dict[str, Any]) -> dict[str, Any]:
        overrides = arguments.get("overrides", {}) | self._changes
        return arguments | {"preset": "demo", "overrides": overrides}


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


def _text(answer: Any) -> str:
    return "\n".join(part.text for part in answer.content if hasattr(part, "text"))


def _table(result: DemoResult) -> Table:
    table = Table(title=f"Lightning OPD on the arithmetic task, seed {result.seed}")
    table.add_column("arm", no_wrap=True)
    for heading in ("accuracy [95 %]", "reverse KL", "steps", "train s", "s per step", "total s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, arm in result.arms.items():
        low, high = arm.accuracy_ci
        table.add_row(
            name,
            f"{arm.accuracy:.3f} [{low:.3f}, {high:.3f}]",
            f"{arm.reverse_kl:.3f}",
            str(arm.steps),
            f"{arm.seconds:.1f}",
            "–" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.3f}",
            f"{arm.seconds_total:.1f}",
        )
    table.caption = "total: training with its responses, or its rollouts and teacher scoring"
    return table
