"""What an agent does with opd-mcp, as a script: inspect → plan → start → follow until done → read the report.

    python examples/agent_session.py --quick                                   # the embedded example, seconds
    python examples/agent_session.py                                           # the embedded example, in full
    python examples/agent_session.py --recipe examples/recipes/one_gpu_quick.toml --allow-root DIR \\
        --prompts DIR/prompts.jsonl --eval-prompts DIR/eval.jsonl

It starts a server of its own over stdio; the run that it starts belongs to itself and goes on when this script or the
server is stopped (`opd-mcp status` shows it). The workspace is OPD_HOME, as for `opd-mcp serve`.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from opd_mcp.schemas.resolve import recipe_arguments

FINAL_STATES = ("succeeded", "failed", "cancelled", "lost")
# Numbers so small that every stage takes a moment: it shows the workflow, and proves nothing about the method.
QUICK = {
    "responses.limit": 16,
    "sft.steps": 5,
    "rollout.count": 32,
    "rollout.sampling.max_new_tokens": 16,
    "distill.steps": 5,
    "benchmark.limit": 16,
    "benchmark.kl_prompts": 16,
    "benchmark.samples_per_prompt": 1,
    "benchmark.sampling.max_new_tokens": 16,
}


class ToolRefused(Exception):
    """A tool answered with an error: it says what was wrong and the way out, and this script has no other way."""


def main() -> int:
    """0 when the run succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of seconds that shows the workflow only")
    parser.add_argument("--recipe", type=Path, help="TOML file: arguments of plan_distillation, tables as overrides")
    parser.add_argument("--allow-root", action="append", default=[], help="a folder the server may read; repeatable")
    for role in ("student", "teacher"):
        parser.add_argument(f"--{role}", help="absolute path, artifact id, run id or Hub id")
    for role in ("prompts", "sft-prompts", "eval-prompts"):
        parser.add_argument(f"--{role}", help="absolute path of JSONL or Parquet, or an artifact id")
    options = vars(parser.parse_args())
    quick, recipe, roots = options.pop("quick"), options.pop("recipe"), options.pop("allow_root")

    arguments: dict[str, Any] = recipe_arguments(recipe) if recipe else {"preset": "demo"}
    arguments |= {name: value for name, value in options.items() if value is not None}
    if quick:
        arguments["overrides"] = arguments.get("overrides", {}) | QUICK
    code = 1
    try:
        code = anyio.run(session, arguments, roots)
    except* ToolRefused:
        pass  # the refusal is printed where it came
    return code


async def session(arguments: dict[str, Any], roots: list[str]) -> int:
    """The workflow, every tool called as an agent calls it."""
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "opd_mcp.cli", "serve", *(part for root in roots for part in ("--allow-root", root))],
        env=dict(os.environ),
    )
    async with Client(server) as client:
        # 1. Where am I, what can this machine do, which paths may I use?
        setup = await call(client, "inspect_setup")

        # 2. What would run, what would it cost, is anything in the way? Without models, the embedded example.
        plan = await call(client, "plan_distillation", with_example(arguments, setup["example"]))
        if plan.get("blocking"):
            return 1

        # 3. The plan's id is the approval. The answer comes at once; the work is a process of its own.
        run = await call(client, "start_distillation", {"plan_id": plan["plan_id"]})

        # 4. Follow: each call blocks until something happens, 25 s at most. An expired wait is not a failure.
        status = run
        while status["state"] not in FINAL_STATES:
            status = await call(client, "get_run_status", {"run_id": run["run_id"], "wait_seconds": 25})
    if status["state"] != "succeeded":
        return 1

    # 5. The evidence: the report next to the model that it is about.
    report = Path(status["result"]["paths"]["report"]) / "report.md"
    print(report.read_text(encoding="utf-8"))
    print(f"The distilled student: {status['result']['paths']['model']}")
    return 0


async def call(client: Client, tool: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tool's structured answer; the text that a model would read is printed."""
    answer = await client.call_tool(tool, dict(arguments or {}))
    text = "\n".join(part.text for part in answer.content if hasattr(part, "text"))
    shown = ", ".join(f"{name}={value!r}" for name, value in (arguments or {}).items())
    print(f"> {tool}({shown})\n{text}\n", flush=True)
    if answer.is_error:
        raise ToolRefused(tool)
    return dict(answer.structured_content or {})


def with_example(arguments: Mapping[str, Any], example: Mapping[str, str]) -> dict[str, Any]:
    """The arguments, with the embedded example's models and prompts where they name neither models nor prompts."""
    if {"student", "teacher", "prompts"} & arguments.keys():
        return dict(arguments)
    embedded = {
        "student": example["student"],
        "teacher": example["teacher"],
        "prompts": example["prompts_opd"],
        "sft_prompts": example["prompts_sft"],
        "eval_prompts": example["prompts_eval"],
    }
    return embedded | dict(arguments)


if __name__ == "__main__":
    sys.exit(main())
