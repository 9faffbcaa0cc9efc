"""Calls every tool of an in-process server once, on real inputs, and prints what the process has loaded.

Run by tests/test_layers.py in a fresh interpreter: `python every_tool_once.py FOLDER`. The only CPU slot is held
while it runs, so that the workers of the runs it starts wait without loading torch until they are cancelled.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pyarrow.parquet as pq
from mcp import Client

from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.models import inspect_model
from opd_mcp.server.app import build_server
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


def calls(folder: Path, plan_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls after the plan."""
    teacher, student = str(EXAMPLES / "teacher"), str(EXAMPLES / "student")
    declared = {"declared_teacher": teacher}
    common, cache = {"preset": "demo"}, str(small_cache(folder))
    swept = {"cache_id": cache, "student": teacher, "points": [{"distill.steps": 1}]}
    return [
        ("inspect_setup", {}),
        ("assess_overhead", {"student": student, "teacher": teacher, "prompts": ["1+1=?"], **common}),
        ("generate_teacher_responses", {"teacher": teacher, "prompts": ["1+1=?"], **common}),
        ("start_sft", {"student": student, "responses": str(folder / "responses.jsonl"), **declared, **common}),
        ("build_teacher_cache", {"teacher": teacher, "student": student, "prompts": ["1+1=?"], **declared, **common}),
        ("inspect_cache", {"cache": cache}),
        ("sweep", {**swept, **declared, **common}),
        ("start_distillation", {"plan_id": plan_id}),
        ("benchmark_student", {"model": student, "prompts": str(EXAMPLES / "tune.jsonl"), **common}),
        ("sample_model", {"model": student, "prompts": ["1+1=?"]}),
        ("export_student", {"model": student, "destination": str(folder / "exports" / "student")}),
        ("get_run_status", {"wait_seconds": 0.1}),
        ("get_run_metrics", {}),
        ("compare_runs", {"run_ids": ["latest"]}),
        ("get_run_logs", {}),
        ("list_artifacts", {}),
        ("open_dashboard", {}),
        ("dashboard_feed", {}),
        ("list_runs", {}),
    ]


def small_cache(folder: Path) -> Path:
    """A teacher cache of one row, written without the engine."""
    cache = folder / "cache"
    shutil.copytree(EXAMPLES / "teacher", cache / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    row = {"prompt_ids": [5, 6], "response_ids": [7, 8], "finish_reason": "length"}
    logprobs = {"teacher_logprobs": [-0.5, -1.5], "behaviour_logprobs": [-0.25, -2.0]}
    pq.write_table(pa.Table.from_pylist([row | logprobs]), cache / "shard-00000.parquet")
    identity = inspect_model(EXAMPLES / "teacher").identity.to_dict()
    manifest = {
        "teacher": identity,
        "behaviour": identity,
        "prompts_sha256": "0" * 64,
        "sampling": {},
        "seed": 0,
        "eos_token_ids": [1],
        "topk": 0,
        "dtype": "float32",
        "vocab_size": 24,
        "shards": [{"file": "shard-00000.parquet", "rows": 1, "tokens": 2, "prompt_tokens": 2, "sha256": "0" * 64}],
        "rollouts": {
            "rows": 1,
            "response_tokens": 2,
            "mean_response_tokens": 2.0,
            "truncated_fraction": 1.0,
            "eos_fraction": 0.0,
            "empty_responses": 0,
            "duplicate_rows": 0,
        },
        "scores": {"mean_teacher_logprob": -1.0},
    }
    (cache / "manifest.json").write_text(json.dumps(manifest))
    return cache


async def session(folder: Path) -> dict[str, Any]:
    """The tools called and the modules loaded at the end."""
    leases = LeaseFolder(folder / "leases", cpu_slots=1)
    for slots in (leases.cpu_slot_names(), ["short-cpu"]):
        leases.acquire("test", slots, 1, lambda: False)
    workspace = Workspace(folder / "workspace")
    roots = AllowedRoots([folder])
    exports = folder / "exports"
    exports.mkdir()
    service = JobService(workspace, roots, JobSettings(lease_folder=leases.root, cpu_slots=1, export_roots=(exports,)))
    (folder / "responses.jsonl").write_text('{"prompt": "1+1=?", "response": "1+1=2;#2"}\n')
    plan_arguments = {
        "teacher": str(EXAMPLES / "teacher"),
        "student": str(EXAMPLES / "student"),
        "prompts": str(EXAMPLES / "opd.jsonl"),
        "sft_prompts": str(EXAMPLES / "sft.jsonl"),
        "eval_prompts": str(EXAMPLES / "tune.jsonl"),
        "preset": "demo",
    }
    called = []

    async with Client(build_server(service)) as client:

        async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
            result = await client.call_tool(tool, arguments)
            assert not result.is_error, f"{tool}: {result.content[0].text}"
            called.append(tool)
            return result.structured_content

        listed = [tool.name for tool in (await client.list_tools()).tools]
        plan = await call("plan_distillation", plan_arguments)
        for tool, arguments in calls(folder, plan["plan_id"]):
            answer = await call(tool, arguments)
        for row in answer["rows"]:
            await call("cancel_run", {"run_id": row["run_id"]})
        with anyio.fail_after(30):
            for row in answer["rows"]:
                while (await call("get_run_status", {"run_id": row["run_id"]}))["state"] == "queued":
                    await anyio.sleep(0.1)
        row = answer["rows"][0]
        assert (await call("resume_run", {"run_id": row["run_id"]}))["state"] == "queued"
        await call("cancel_run", {"run_id": row["run_id"]})
    return {"called": sorted(set(called)), "listed": sorted(listed), "modules": sorted(sys.modules)}


if __name__ == "__main__":
    print(json.dumps(anyio.run(session, Path(sys.argv[1]).resolve())))
