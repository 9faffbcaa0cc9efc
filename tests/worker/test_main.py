"""The worker with the real engine: one small run through every phase, and what the process looks like from outside."""

import os
import subprocess
import sys

import psutil
import pytest

from opd_mcp.identity.lineage import read_lineage
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.reports import BenchmarkReport, CheckpointRecord
from opd_mcp.store.journal import read_journal
from opd_mcp.store.runs import RunLock

SHORT = {
    "sft.steps": 3,
    "sft.batch_size": 4,
    "sft.on_truncated": "keep",
    "rollout.count": 8,
    "distill.steps": 3,
    "distill.batch_size": 4,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 4,
    **{f"{stage}.sampling.max_new_tokens": 8 for stage in ("responses", "rollout", "benchmark")},
}


def test_the_engine_distills_through_all_phases_and_live_reuses_what_it_can(world, real_service, finished):
    prompts = world.prompts()
    common = {"prompts": prompts, "eval_prompts": world.prompts("eval", start=40)}
    run = real_service.start_distillation(world.start_arguments(overrides=SHORT, **common))
    status = finished(real_service, run.run_id)
    assert status.state == "succeeded", status
    cache = real_service.store.artifacts.get(run.cache_id).path
    manifest = CacheManifest.from_json((cache / "manifest.json").read_bytes())
    assert manifest.sft_teacher.basis == "proven"
    assert manifest.rollouts.rows == 8
    report_path = real_service.store.artifacts.get(status.result["artifacts"]["report"]).path
    report = BenchmarkReport.from_json((report_path / "report.json").read_bytes())
    assert [model.name for model in report.models] == ["distilled", "sft", "teacher", "base"]
    assert report.teacher_basis == "proven"
    assert {cost.stage for cost in report.costs} >= {"sft", "rollout", "score", "distill"}
    assert status.result["training"]["distill"]["steps"] == 3
    model = real_service.store.artifacts.get(status.result["artifacts"]["model"])
    assert read_lineage(model.path).model.name == model.artifact_id
    assert not list(model.path.parent.glob(".building-*"))

    live = real_service.start_distillation(world.start_arguments(method="live", overrides=SHORT, **common))
    status = finished(real_service, live.run_id)
    assert status.state == "succeeded", status
    reused = {cost["stage"]: cost["reused"] for cost in status.result["costs"]}
    assert reused == {"generate_responses": True, "sft": True, "distill": False, "benchmark": False}
    plan = real_service.plan(world.plan_arguments(overrides=SHORT | {"runtime.seed": 5}, **common))
    phases = plan.estimates[0].phases
    assert all("measured" in phase.basis for phase in phases)
    # Both runs loaded the engine once, and the artifact that came first holds what that took.
    assert (phases[0].phase, phases[0].basis.split(":")[0]) == ("process_start", "measured in 2 earlier run(s)")


def test_sigterm_saves_a_checkpoint(world, real_service, finished, until):
    overrides = SHORT | {"sft.steps": 2000, "checkpoint.steps": 1000}
    run = real_service.start_distillation(world.start_arguments(overrides=overrides, method="sft"))
    until(real_service, run.run_id, lambda status: status.phase == "sft" and status.progress and status.progress.done)
    worker = next(p for p in psutil.process_iter(["cmdline"]) if run.run_id in (p.info["cmdline"] or []))
    worker.terminate()
    status = finished(real_service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "worker_terminated")
    directory = real_service.workspace.run(run.run_id)
    [checkpoint] = (directory / "checkpoints" / "sft").glob("step-*")
    record = CheckpointRecord.from_json((checkpoint / "checkpoint.json").read_bytes())
    journal = read_journal(directory / "journal.jsonl")
    assert journal[record.journal_position - 1].type in ("metric", "progress")
    assert [r for r in journal if r.type == "metric"][-1].data["step"] == record.state.step


def test_without_eval_prompts_only_the_reverse_kl_is_measured(world, real_service, finished):
    run = real_service.start_distillation(world.start_arguments(overrides=SHORT, method="sft"))
    status = finished(real_service, run.run_id)
    assert status.state == "succeeded", status
    scores = status.result["scores"]
    assert list(scores) == ["sft", "base"]
    for score in scores.values():
        assert "greedy_accuracy" not in score
        assert score["reverse_kl"][0] > 0


def test_a_queued_worker_has_no_torch_and_is_a_session_of_its_own(world, real_service, busy_machine, until):
    run = real_service.start_distillation(world.start_arguments(overrides=SHORT))
    until(real_service, run.run_id, lambda status: status.queue_position == 1)
    worker = next(p for p in psutil.process_iter(["cmdline"]) if run.run_id in (p.info["cmdline"] or []))
    assert not any("libtorch" in mapped.path for mapped in worker.memory_maps())
    assert psutil.Process().pid != worker.pid
    assert os.getsid(worker.pid) == worker.pid
    assert os.readlink(f"/proc/{worker.pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{worker.pid}/fd/1").endswith("worker.log")
    real_service.cancel(run.run_id)


def test_nobody_else_may_work_on_a_run(world, real_service, busy_machine):
    run = real_service.start_distillation(world.start_arguments(overrides=SHORT))
    with pytest.raises(RunError, match="run_locked"):
        RunLock.acquire(real_service.workspace.run(run.run_id))
    real_service.cancel(run.run_id)


def test_the_service_imports_nothing_heavy():
    heavy = {"torch", "transformers", "pyarrow", "huggingface_hub", "mcp"}
    script = f"import sys, opd_mcp.service; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
