"""A whole run on two devices by a real worker: a rank that is killed fails it with the reason, and it is resumed.

Its rollouts and scores are shared with a helper.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

import opd_mcp
from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.reports import CheckpointRecord
from opd_mcp.service import JobService
from opd_mcp.store.journal import read_journal
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

PACKAGE = Path(opd_mcp.__file__).parents[1]
# workers of this checkout, wherever the tests are started
COMMAND = f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); from opd_mcp.cli import main; main()"
SHORT = {
    "runtime.devices": 2,
    "responses.limit": 24,
    "sft.steps": 200,
    "sft.batch_size": 4,
    "sft.on_truncated": "keep",
    "rollout.count": 16,
    "rollout.batch_size": 4,  # so that there are batches to share
    "score.micro_batch_tokens": 64,
    "distill.steps": 4,
    "distill.batch_size": 4,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 4,
    "checkpoint.steps": 10,
    **{f"{stage}.sampling.max_new_tokens": 8 for stage in ("responses", "rollout", "benchmark")},
}


@pytest.fixture
def service(world) -> JobService:
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples)
    settings = dataclasses.replace(settings, worker_command=(sys.executable, "-c", COMMAND, "worker"))
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)


def ranks_of(run_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if run_id in (process.info["cmdline"] or []):
            found += [child for child in process.children() if "opd_mcp.worker.teams.rank_process" in child.cmdline()]
    return found


def test_a_killed_rank_fails_the_run_with_the_reason_and_a_resume_finishes_it(world, service, until, finished) -> None:
    arguments = {"prompts": world.prompts(), "eval_prompts": world.prompts("eval", start=40), "overrides": SHORT}
    plan = service.plan(world.plan_arguments(**arguments))
    assert not plan.blocking
    run = service.start_distillation(world.start_arguments(**arguments))
    until(service, run.run_id, lambda status: status.phase == "sft" and status.progress and status.progress.done > 20)
    ranks = ranks_of(run.run_id)
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "rank_lost")
    assert "of 2" in status.error.cause
    assert "SIGKILL" in status.error.cause
    assert [rank for rank in ranks if rank.is_running()] == []
    directory = service.workspace.run(run.run_id)
    checkpoint = sorted((directory / "checkpoints" / "sft").glob("step-*"))[-1]
    record = CheckpointRecord.from_json((checkpoint / "checkpoint.json").read_bytes())
    assert len(record.files) == 2

    service.resume(run.run_id)
    until(service, run.run_id, lambda status: status.phase in ("rollout", "score", "distill"))
    until(service, run.run_id, lambda status: status.phase == "distill")
    status = finished(service, run.run_id)
    assert status.state == "succeeded", status
    journal = list(read_journal(directory / "journal.jsonl"))
    assert "helper_lost" not in [entry.data["code"] for entry in journal if entry.type == "alert"]
    events = [entry.data for entry in journal if entry.type == "phase"]
    resumed = [(event["phase"], event["step"]) for event in events if event["event"] == "resumed"]
    assert resumed == [("sft", record.state.step)]
    training = status.result["training"]
    assert (training["sft"]["devices"], training["distill"]["devices"]) == (2, 2)
    assert ranks_of(run.run_id) == []
    assert [*directory.glob("ranks-*"), *directory.glob("helpers-*")] == []
