"""The demo: a real client drives a real server over stdio through the whole method on an embedded task.

It uses nothing but the tools that any agent sees; only Ctrl-C cancels its runs by their files, since the server may be
gone by then. Runs take both cores where there are two, one thread each; an identical earlier stage (responses, SFT,
teacher cache) is reused by content, never computed twice.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
from anyio.abc import TaskStatus
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.reports import Verdict
from opd_mcp.schemas.resolve import recipe_arguments
from opd_mcp.store.runs import request_cancel, run_directory
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace

FINAL_STATES = ("succeeded", "failed", "cancelled", "lost")
SHORT_STEPS = {"distill.steps": 200}
# four times the batch, so that few steps end alike whatever the seed: chosen on tune.jsonl (docs/results.md)
TOPK_STEPS = SHORT_STEPS | {"distill.batch_size": 256}
TaskName = Literal["arithmetic", "chain_sum"]
OTHER_STYLE = ("sft_other_style", "lightning_other_style")
ARMS: dict[TaskName, tuple[str, ...]] = {
    "arithmetic": ("base", "sft", "lightning_sampled", "lightning_topk", "live", "teacher", *OTHER_STYLE),
    "chain_sum": ("base", "sft", "lightning_topk", "live", "teacher"),
}
# half of lightning's steps
LIVE_CHANGES: dict[TaskName, dict[str, Any]] = {"arithmetic": SHORT_STEPS, "chain_sum": {"distill.steps": 150}}
RECIPE_FILE = "recipe.toml"
DESCRIPTION = 34
Answer = TypeVar("Answer")
# every stage on a few rows: seconds of work per run
QUICK = {
    "responses.limit": 16,
    "sft.steps": 4,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "rollout.count": 16,
    "rollout.sampling.max_new_tokens": 16,
    "distill.steps": 3,
    "distill.batch_size": 4,
    "benchmark.limit": 64,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 4,
}


@dataclass(frozen=True)
class Task:
    """An embedded task: its name, its files by role, and the arguments of every call and of every distillation."""

    name: TaskName
    files: Mapping[str, str]
    arguments: Mapping[str, Any]
    distillation: Mapping[str, Any]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms, in the order of the table."""
        return ARMS[self.name]

    @property
    def main_arm(self) -> str:
        """The arm whose run makes the SFT student and the teacher cache."""
        return next(arm for arm in self.arms if arm.startswith("lightning"))


def embedded_task(name: TaskName, example: Mapping[str, str]) -> Task:
    """The task of this name; `example` are the paths of the arithmetic task, next to which the others are."""
    if name == "arithmetic":
        return Task(name, example, {"preset": "demo"}, {})
    folder = Path(example["student"]).parent.with_name(name)
    files = {"teacher": "teacher", "student": "student"}
    files |= {f"prompts_{name}": f"{name}.jsonl" for name in ("sft", "opd", "eval")}
    paths = {role: str(folder / file) for role, file in files.items()}
    given = recipe_arguments(folder / RECIPE_FILE)
    common = {key: given.pop(key) for key in ("preset", "overrides")}
    return Task(name, paths, common, given)


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
    """The file that `--json` writes; only a task with a second teacher shows the guard."""

    task: TaskName
    arms: dict[str, Arm]
    consistency_guard: Guard | None = None
    wall_seconds: float
    seed: int
    conclusion: list[str] = Field(default_factory=list, exclude=True, description="verdict, next step, the page")
    is_bad: bool = Field(False, exclude=True, description="whether the verdict is shown in red")
    changed: bool = Field(False, exclude=True, description="whether the recipe was not the demo's")


CHANGED = (
    "This shows that everything runs here. After so few steps the figures prove nothing about the method; those of the "
    "whole demo, without --quick, do."
)


def run_demo(
    seed: int,
    json_path: Path | None,
    workspace: Path,
    *,
    task: TaskName = "arithmetic",
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the demo of a task in a new workspace below `workspace`, print its last screen, write `json_path` if given.

    `overrides` change the recipe of every arm; with them the numbers are no longer the demo's. Ctrl-C cancels its runs
    and ends with exit status 130.
    """
    home = workspace / "demos" / f"{task}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console()
    result = anyio.run(interruptible, partial(_demo, task, seed, home, console, dict(overrides or {})))
    if result is None:
        print_plain(console, stopped_text(home, cancelled_runs(home)))
        raise SystemExit(128 + signal.SIGINT)
    show_result(result, home, console)
    if json_path is not None:
        json_path.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def show_result(result: DemoResult, home: Path, console: Console) -> None:
    """The last screen: verdict, one table, the guard, and where everything is."""
    if result.changed:
        print_plain(console, CHANGED)
    for number, line in enumerate(result.conclusion):
        print_plain(console, line, "red" if result.is_bad and number == 0 else "")
    console.print(result_table(result))
    if guard := result.consistency_guard:
        said = "refused as it should be" if guard.refused else "NOT REFUSED, and it should have been"
        print_plain(console, f"Guard against a teacher that is not the SFT teacher: {said}.")
        print_plain(console, guard.message)
    print_plain(console, f"{result.wall_seconds:.0f} s in all. Everything it made is in {home}")


def print_plain(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is, wrapped at words; on a terminal in a style."""
    console.print(text, markup=False, highlight=False, style=style)


def cancelled_runs(home: Path) -> list[str]:
    """The ids of the demo's runs that were active, now asked to stop; none where it had not made a workspace."""
    if not home.is_dir():
        return []
    store = Store(Workspace(home))
    active = store.active_runs()
    for run_id in active:
        request_cancel(run_directory(store.workspace, run_id))
    return active


def stopped_text(home: Path, run_ids: Sequence[str]) -> str:
    """What Ctrl-C did."""
    runs = f"{len(run_ids)} of its runs are cancelled ({', '.join(run_ids)})" if run_ids else "no run was active"
    return f"Demo stopped; {runs}. What it had made is in {home}; delete that folder if you do not need it."


async def interruptible(work: Callable[[], Awaitable[Answer]]) -> Answer | None:
    """What the work answers; None once Ctrl-C has ended it, whatever else went wrong while it was ending."""
    answers: list[Answer] = []
    interrupted = anyio.Event()

    async def watch(*, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                interrupted.set()
                tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(watch)
            answers.append(await work())
            tasks.cancel_scope.cancel()
    except Exception:
        if not interrupted.is_set():
            raise
    return answers[0] if answers else None


async def _demo(name: TaskName, seed: int, home: Path, console: Console, changes: dict[str, Any]) -> DemoResult:
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
            arms, guard = await session.all_arms(name)
    return DemoResult(
        task=name,
        arms={arm: arms[arm] for arm in ARMS[name]},
        consistency_guard=guard,
        wall_seconds=time.perf_counter() - started,
        seed=seed,
        conclusion=session.conclusion,
        is_bad=session.is_bad,
        changed=bool(changes),
    )


class _Session:
    """One client's way through the demo."""

    def __init__(self, client: Client, changes: dict[str, Any], progress: Progress, console: Console) -> None:
        self._client, self._changes, self._progress, self._console = client, changes, progress, console
        self._results: dict[str, dict[str, Any]] = {}
        self._common: Mapping[str, Any] = {}
        self.conclusion: list[str] = []
        """The verdict on the main arm, its next step, and where the report's page is."""
        self.is_bad = False

    async def all_arms(self, name: TaskName) -> tuple[dict[str, Arm], Guard | None]:
        """Every arm's row, and the guard's answer where the task has a second teacher."""
        embedded = embedded_task(name, (await self._call("inspect_setup"))["example"])
        self._common = embedded.arguments
        files = embedded.files
        task = {
            "student": files["student"],
            "teacher": files["teacher"],
            "prompts": files["prompts_opd"],
            "sft_prompts": files["prompts_sft"],
            "benchmark": False,
            **embedded.distillation,
        }
        sft_done, cache_done, guards = anyio.Event(), anyio.Event(), []

        async def lightning() -> None:
            plan = await self._call("plan_distillation", **self._with_settings(_without(task, "benchmark")))
            self._console.print(f"plan {plan['plan_id']}: {', '.join(phase['name'] for phase in plan['phases'])}")
            await self._run(embedded.main_arm, task, {"sft": sft_done, "score": cache_done})

        async def live() -> None:
            await sft_done.wait()
            await self._run("live", task | {"method": "live", "overrides": LIVE_CHANGES[name]})

        async def topk() -> None:
            await cache_done.wait()
            await self._run("lightning_topk", task | {"estimator": "topk_reverse_kl", "overrides": TOPK_STEPS})

        async def other_style() -> None:
            other = task | {"teacher": files["teacher_other_style"], "method": "sft"}
            await self._run("sft_other_style", other)
            student = self._results["sft_other_style"]["artifacts"]["sft"]
            mismatched = _without(task, "sft_prompts") | {"student": student, "overrides": SHORT_STEPS}
            guards.append(await self._guard(mismatched))
            allowed = mismatched | {"allow_teacher_mismatch": True}
            # This client has no user to ask, so it names the plan that a user would agree to.
            plan = await self._call("plan_distillation", **self._with_settings(_without(allowed, "benchmark")))
            await self._run("lightning_other_style", allowed | {"confirm": plan["plan_id"]})

        starts = {"lightning_topk": topk, embedded.main_arm: lightning, OTHER_STYLE[0]: other_style, "live": live}
        async with anyio.create_task_group() as tasks:
            for arm, start in starts.items():
                if arm in embedded.arms:
                    tasks.start_soon(start)
        return self._rows(embedded, await self._scores(embedded)), guards[0] if guards else None

    async def _guard(self, arguments: dict[str, Any]) -> Guard:
        answer = await self._client.call_tool("start_distillation", self._with_settings(arguments))
        return Guard(refused=bool(answer.is_error), message=_text(answer))

    async def _scores(self, task: Task) -> dict[str, dict[str, Any]]:
        models = {
            "base": task.files["student"],
            "teacher": task.files["teacher"],
            "sft": self._made(task.main_arm, "sft"),
            **{name: self._made(name, "sft" if name in OTHER_STYLE[:1] else "model") for name in self._results},
        }
        scores: dict[str, dict[str, Any]] = {}

        async def measure(number: int, names: Sequence[str]) -> None:
            first, *others = [models[name] for name in names]
            # The teacher is an arm of its own, measured once.
            arguments = {
                "overrides": {"benchmark.references": []},
                "model": first,
                "baselines": others,
                "prompts": task.files["prompts_eval"],
                "teacher": task.files["teacher"],
            }
            result = await self._follow(f"benchmark {number}", await self._start("benchmark_student", arguments), {})
            scores.update(zip(names, result["scores"].values(), strict=True))
            if names[0] == task.main_arm:
                self.conclusion = conclusion_of(result, names)
                self.is_bad = Verdict.model_validate(result["verdict"]).is_bad

        first = [task.main_arm, "sft", "base", "teacher"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(measure, 1, first)
            tasks.start_soon(measure, 2, [name for name in task.arms if name not in first])
        return scores

    def _rows(self, task: Task, scores: dict[str, dict[str, Any]]) -> dict[str, Arm]:
        rows = {}
        for name, score in scores.items():
            source = task.main_arm if name == "sft" else name
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
        return str((await self._call(tool, **self._with_settings(arguments)))["run_id"])

    async def _follow(self, label: str, run_id: str, reached: dict[str, anyio.Event]) -> dict[str, Any]:
        bar, shown = self._progress.add_task(label[:DESCRIPTION], total=1), ""
        while True:
            status = await self._call("get_run_status", run_id=run_id, wait_seconds=2)
            for phase, event in reached.items():
                if phase in status.get("phases_done", []):
                    event.set()
            phase = status.get("phase", status["state"])
            done = status.get("progress", {"done": 0, "total": 1})
            share = done["done"] / done["total"]
            self._progress.update(bar, description=f"{label}: {phase}"[:DESCRIPTION], completed=share)
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

    def _with_settings(self, arguments: dict[str, Any]) -> dict[str, Any]:
        overrides = {**self._common.get("overrides", {}), **arguments.get("overrides", {}), **self._changes}
        return {**self._common, **arguments, "overrides": overrides}


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


def _text(answer: Any) -> str:
    return "\n".join(part.text for part in answer.content if hasattr(part, "text"))


def conclusion_of(result: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """The verdict of a benchmark in the arms' names, its next step and its page; `arms` in the order of the scores."""
    verdict = Verdict.model_validate(result["verdict"])
    text = verdict.text()
    for model, arm in zip(result["scores"], arms, strict=True):
        if not model.isalpha():  # an artifact's id; a folder's name such as `student` is also a word of the text
            text = text.replace(model, arm)
    page = result.get("paths", {}).get("report_page")
    return [text, *([f"Next: {verdict.next_action.why}"] if verdict.next_action.why else []), *filter(None, [page])]


def result_table(result: DemoResult) -> Table:
    """One row per arm, in at most 80 columns."""
    title = f"Lightning OPD on the {result.task} task, seed {result.seed}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for heading in ("accuracy [95 %]", "KL", "steps", "train s", "total s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, arm in result.arms.items():
        low, high = arm.accuracy_ci
        table.add_row(
            name,
            f"{arm.accuracy:.3f} [{low:.3f}, {high:.3f}]",
            f"{arm.reverse_kl:.3f}",
            str(arm.steps),
            f"{arm.seconds:.1f}",
            f"{arm.seconds_total:.1f}",
        )
    kl = "KL: reverse, to the teacher, nats per token"
    table.caption = f"{kl}\ntotal: training with its responses, or with its rollouts and scoring"
    return table
