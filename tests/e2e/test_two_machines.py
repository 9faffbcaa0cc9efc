"""Student and teacher on two machines: two processes with nothing but HTTP between them, from cache to report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_mcp.schemas.cache import CacheManifest

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
KEY = "the-key-between-the-machines"
FINAL = {"succeeded", "failed", "cancelled", "lost"}
OVERRIDES = {
    "rollout.count": 24,
    "rollout.shard_rows": 8,
    "rollout.sampling.max_new_tokens": 16,
    "distill.steps": 3,
    "distill.batch_size": 4,
    "benchmark.samples_per_prompt": 1,
    "benchmark.sampling.max_new_tokens": 16,
}


@pytest.fixture
def teacher_url(tmp_path):
    """The address of `opd-mcp serve-teacher` in a process of its own."""
    command = [sys.executable, "-m", "opd_mcp.cli", "serve-teacher", str(EXAMPLES / "teacher"), "--port", "0"]
    environment = {"PATH": os.environ["PATH"], "OPD_TEACHER_KEY": KEY}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        yield re.search(r"http://\S+", line).group()
        process.terminate()


@pytest.fixture
def world_with_key(world, monkeypatch):
    real = type(world).environment
    monkeypatch.setattr(type(world), "environment", lambda self: real(self) | {"OPD_TEACHER_KEY": KEY})
    return world


async def ended(client, answer, run_id):
    for _ in range(30):
        status = await answer(client, "get_run_status", run_id=run_id, wait_seconds=25)
        if status["state"] in FINAL:
            return status
    raise AssertionError("the run did not end")


async def finished(client, answer, run_id):
    status = await ended(client, answer, run_id)
    assert status["state"] == "succeeded", status
    return status["result"]


async def test_a_cache_is_built_over_http_then_distilled_and_benchmarked(
    world_with_key, teacher_url, connect, answer, tmp_path
):
    world = world_with_key
    common = {"preset": "demo", "overrides": OVERRIDES}
    student = str(EXAMPLES / "student")
    async with connect() as client:
        started = await answer(
            client,
            "build_teacher_cache",
            teacher="teacher",
            teacher_url=teacher_url,
            student=student,
            prompts=str(world.data / "prompts.jsonl"),
            declared_teacher="teacher",
            dtype="float16",
            topk=4,
            on_truncated="drop",
            **common,
        )
        await finished(client, answer, started["run_id"])
        shown = await answer(client, "inspect_cache", cache=started["cache_id"])
        distilled = await answer(
            client,
            "start_distillation",
            student=student,
            cache_id=started["cache_id"],
            declared_teacher="teacher",
            eval_prompts=str(world.data / "eval.jsonl"),
            **common,
        )
        result = await finished(client, answer, distilled["run_id"])
        failed = await answer(
            client,
            "build_teacher_cache",
            teacher="teacher",
            teacher_url=f"{teacher_url}/nowhere",
            student=student,
            prompts=str(world.data / "prompts.jsonl"),
            declared_teacher="teacher",
            **common,
        )
        refused = await ended(client, answer, failed["run_id"])
        mismatch = await client.call_tool(
            "start_distillation",
            {"student": student, "cache_id": started["cache_id"], "declared_teacher": "another", **common},
        )
    assert (refused["state"], refused["error"]["code"]) == ("failed", "teacher_refused")
    assert mismatch.is_error
    assert "[teacher_mismatch]" in mismatch.content[0].text
    assert set(result["scores"]) == {"distilled", "sft"}
    cache = world.workspace / "artifacts" / "cache" / started["cache_id"]
    manifest = CacheManifest.from_json((cache / "manifest.json").read_bytes())
    assert (manifest.dtype, manifest.topk, manifest.hygiene.on_truncated) == ("float16", 4, "drop")
    assert manifest.teacher.remote == "served"
    assert len(shown["sample"]) == 2
    assert len(json.dumps(shown)) < 12_000
    teacher = str(EXAMPLES / "teacher")
    assert not [path for path in world.workspace.rglob("*.json*") if teacher in path.read_text()]
    everything = [path for path in world.workspace.rglob("*") if path.is_file()]
    assert {"worker.log", "journal.jsonl", "run.json", "manifest.json", "opd.sqlite"} <= {p.name for p in everything}
    assert not [path for path in everything if KEY.encode() in path.read_bytes()]
    command = [sys.executable, "-m", "opd_mcp.cli", "cache", "verify", started["cache_id"], "--teacher", teacher]
    environment = world.environment()
    proven = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert proven.returncode == 0, proven.stdout + proven.stderr
    assert "nothing is wrong" in proven.stdout
