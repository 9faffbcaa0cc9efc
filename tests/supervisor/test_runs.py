"""Runs as real processes: they own themselves, queue, stop when asked, and leave no lie behind when they die."""

import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from opd_mcp.schemas.errors import ResourceError, RunError, UnknownIdError
from opd_mcp.schemas.requests import BuildTeacherCache, GenerateTeacherResponses, SampleModel, StartSft
from opd_mcp.store.journal import read_journal
from opd_mcp.worker.pipeline import require_disk

LONG = {"sft.steps": 100_000}


def worker_of(run_id: str) -> psutil.Process:
    """The worker process of a run."""
    return next(process for process in psutil.process_iter(["cmdline"]) if run_id in (process.info["cmdline"] or []))


def directory_of(world, run_id: str) -> Path:
    return world.root / "home" / "runs" / run_id


def made(status, role: str) -> str:
    return status.result["artifacts"][role]


def test_a_run_goes_through_all_phases_and_names_what_it_made(world, service, finished):
    arguments = world.start_arguments(sft_prompts=world.prompts("sft"), eval_prompts=world.prompts("eval", start=50))
    started = service.start_distillation(arguments)
    assert started.next_action.call_text() == f"Call get_run_status(run_id='{started.run_id}', wait_seconds=25)"
    status = finished(service, started.run_id)
    assert status.state == "succeeded", status
    assert status.phases_done == ["generate_responses", "sft", "rollout", "score", "distill", "benchmark"]
    assert status.result["artifacts"]["cache"] == started.cache_id
    assert all(Path(path).is_dir() for path in status.result["paths"].values())
    assert list(status.result["scores"]) == ["distilled", "sft"]
    assert status.result["scores"]["distilled"]["greedy_accuracy"] == [0.5, 0.4, 0.6]
    assert [cost["stage"] for cost in status.result["costs"]] == status.phases_done
    assert status.metrics == {}
    assert "The call changes 'distill.steps' from 3 to 400." in status.next_action.why, "three steps say little"
    assert not (directory_of(world, started.run_id) / "rollouts").exists()
    assert not list((world.root / "home" / "artifacts").glob("*/.building-*"))


def test_the_same_request_again_is_a_new_run_that_reuses_every_phase(world, service, finished):
    first = finished(service, service.start_distillation(world.start_arguments()).run_id)
    again = service.start_distillation(world.start_arguments())
    assert (again.run_id != first.run_id, again.reused) == (True, False)
    second = finished(service, again.run_id)
    assert second.state == "succeeded", second
    assert second.result["artifacts"] == first.result["artifacts"]
    assert all(cost["reused"] for cost in second.result["costs"])


def test_a_damaged_result_is_not_reused(world, service, finished):
    first = finished(service, service.start_distillation(world.start_arguments()).run_id)
    (Path(first.result["paths"]["report"]) / "report.json").write_text("{}")
    second = finished(service, service.start_distillation(world.start_arguments()).run_id)
    assert (second.state, second.error.code) == ("failed", "damaged_file")
    assert "report.json" in second.error.cause


def test_the_steps_one_by_one_make_what_one_run_made(world, service, finished):
    short = {"sft.steps": 3, "distill.steps": 3}
    whole = finished(service, service.start_distillation(world.start_arguments()).run_id)
    common = {"preset": "demo", "overrides": short}
    responses = service.generate_teacher_responses(
        GenerateTeacherResponses(teacher=world.teacher, prompts=world.prompts(), **common)
    )
    assert (
        finished(service, responses.run_id).result["artifacts"]["responses"] == whole.result["artifacts"]["responses"]
    )
    sft = service.start_sft(StartSft(student=world.student, responses=responses.run_id, **common))
    assert made(finished(service, sft.run_id), "sft") == made(whole, "sft")
    cache = service.build_teacher_cache(
        BuildTeacherCache(teacher=world.teacher, student=sft.run_id, prompts=world.prompts(), **common)
    )
    assert cache.cache_id == made(whole, "cache")
    finished(service, cache.run_id)
    distilled = service.start_distillation(
        world.start_arguments().model_copy(
            update={"student": sft.run_id, "cache_id": cache.cache_id, "teacher": None, "prompts": None}
        )
    )
    status = finished(service, distilled.run_id)
    assert made(status, "model") == made(whole, "model")
    assert status.phases_done == ["distill", "benchmark"]


def test_equal_requests_while_one_is_active_are_that_run(world, service, until):
    arguments = world.start_arguments(overrides=LONG)
    first = service.start_distillation(arguments)
    assert not first.reused
    until(service, first.run_id, lambda status: status.phase == "sft")
    copy = world.copy_of(world.student, "a-copy-of-the-student")
    for same in (arguments, arguments.model_copy(update={"student": str(copy)})):
        again = world.service().start_distillation(same)
        assert (again.run_id, again.reused, again.state) == (first.run_id, True, "running")
    service.cancel(first.run_id)


def test_equal_requests_at_the_same_moment_start_one_run(world, service, busy_machine):
    arguments, services = world.start_arguments(), [world.service() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda server: server.start_distillation(arguments), services))
    assert len({answer.run_id for answer in answers}) == 1
    assert sorted(answer.reused for answer in answers) == [False, True, True, True]
    service.cancel("latest")


def test_a_queued_run_knows_its_place_and_can_be_cancelled(world, service, busy_machine, until, finished):
    first = service.start_distillation(world.start_arguments())
    until(service, first.run_id, lambda status: status.queue_position == 1)
    second = service.start_distillation(world.start_arguments(overrides={"runtime.seed": 1}))
    status = until(service, second.run_id, lambda status: status.queue_position == 2)
    assert (status.state, status.phase, status.eta_s) == ("queued", None, None)
    assert status.waits_for == f"waits for a CPU slot: 2 of 2 held by somebody-else; behind {first.run_id}"
    assert service.cancel(first.run_id).state in {"queued", "cancelled"}
    assert finished(service, first.run_id).state == "cancelled"
    until(service, second.run_id, lambda status: status.queue_position == 1)
    busy_machine.release()
    assert finished(service, second.run_id).state == "succeeded"


def test_a_sample_does_not_wait_behind_long_runs(world, service, leases, until, finished):
    held = leases.acquire("a-long-run", leases.cpu_slot_names(), 2, lambda: False)
    queued = service.start_distillation(world.start_arguments())
    until(service, queued.run_id, lambda status: status.queue_position == 1)
    sample = service.sample_model(SampleModel(model=world.student, prompts=["1+1=?"]))
    assert finished(service, sample.run_id).state == "succeeded"
    assert service.status(queued.run_id).state == "queued"
    held.release()
    assert finished(service, queued.run_id).state == "succeeded"


def test_a_running_run_stops_at_its_next_step(world, service, until, finished):
    run = service.start_distillation(world.start_arguments(overrides=LONG))
    until(service, run.run_id, lambda status: status.phase == "sft" and status.progress is not None)
    service.cancel(run.run_id)
    status = finished(service, run.run_id)
    assert (status.state, status.error, status.phases_done) == ("cancelled", None, ["generate_responses"])
    with pytest.raises(RunError, match=r"run_not_active.*cancelled"):
        service.cancel(run.run_id)


def test_a_run_outlives_the_process_that_started_it(world, service, finished):
    script = f"""
        import sys
        from pathlib import Path
        from opd_mcp.service import JobService
        from opd_mcp.devices.settings import JobSettings
        from opd_mcp.schemas.requests import StartDistillation
        from opd_mcp.store.roots import AllowedRoots
        from opd_mcp.store.workspace import Workspace

        root = Path({str(world.root)!r})
        settings = JobSettings(root / "leases", 2, worker_command={world.settings.worker_command!r})
        service = JobService(Workspace(root / "home"), AllowedRoots([root / "data"]), settings)
        arguments = StartDistillation.from_json(sys.stdin.read())
        print(service.start_distillation(arguments).run_id)
    """
    arguments = world.start_arguments(overrides={"sft.steps": 50})
    server = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=arguments.to_json(),
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    run_id = server.stdout.strip()
    assert service.status(run_id).state in {"queued", "running"}
    assert service.status("latest").run_id == run_id
    assert finished(service, run_id).state == "succeeded"


def test_a_killed_worker_is_lost_and_frees_its_slot_and_request(world, service, leases, until, finished):
    arguments = world.start_arguments(overrides=LONG)
    run = service.start_distillation(arguments)
    until(service, run.run_id, lambda status: status.phase == "sft")
    assert len(leases.busy(leases.cpu_slot_names())) == 1
    worker_of(run.run_id).kill()
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("lost", "worker_lost")
    assert status.next_action.call_text() == f"Call resume_run(run_id='{run.run_id}')"
    assert not leases.busy(leases.cpu_slot_names())
    assert [row.state for row in service.list_runs(state="lost").rows] == ["lost"]
    again = service.start_distillation(arguments)
    assert not again.reused
    until(service, again.run_id, lambda status: status.phase == "sft")
    service.cancel(again.run_id)


def test_a_crash_in_a_stage_is_a_failed_run_with_the_end_of_its_log(world, service, finished):
    overrides = {"sft.optimizer": {"learning_rate": 666.0}}
    with pytest.raises(ValueError, match="unknown_override"):
        service.start_distillation(world.start_arguments(overrides=overrides))
    overrides = {"sft.optimizer.learning_rate": 666.0}
    run = service.start_distillation(world.start_arguments(overrides=overrides))
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "internal_error")
    assert "the learning rate of the beast" in status.error.cause
    assert any("ZeroDivisionError" in line for line in status.error.log_tail)
    assert len(status.error.log_tail) <= 15
    assert status.next_action.call_text() == f"Call resume_run(run_id='{run.run_id}')"
    assert not list((world.root / "home" / "artifacts").glob("*/.building-*"))


@pytest.mark.parametrize("changed", ["student", "prompts"])
def test_an_input_that_changed_before_the_worker_came_to_it_stops_the_run(
    world, service, busy_machine, finished, changed
):
    student = world.copy_of(world.student, "student")
    run = service.start_distillation(world.start_arguments(student=str(student)))
    if changed == "prompts":
        world.prompts(count=7)
    else:
        weights = bytearray((student / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (student / "model.safetensors").write_bytes(weights)
    busy_machine.release()
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "input_changed")


def test_the_journal_holds_few_progress_lines_and_every_metric(world, service, finished):
    run = service.start_distillation(world.start_arguments(overrides={"sft.steps": 60}))
    status = finished(service, run.run_id)
    records = read_journal(directory_of(world, run.run_id) / "journal.jsonl")
    assert sum(record.type == "metric" for record in records) == 63
    assert sum(record.type == "progress" for record in records) <= 12
    assert status.next_check_s is None


def test_unknown_runs_are_named_with_their_neighbours(world, service, finished):
    with pytest.raises(UnknownIdError, match="no run in this workspace yet"):
        service.status()
    run = service.start_distillation(world.start_arguments())
    with pytest.raises(UnknownIdError, match=run.run_id):
        service.status(run.run_id[:-1])
    finished(service, run.run_id)


def test_the_wait_token_changes_with_the_phase(world, service, until, finished):
    run = service.start_distillation(world.start_arguments(overrides={"sft.steps": 30}))
    until(service, run.run_id, lambda status: status.phase == "sft")
    during = service.wait_token(run.run_id)
    assert during == service.wait_token(run.run_id)
    finished(service, run.run_id)
    assert service.wait_token("latest") != during


def test_what_a_killed_worker_built_is_taken_up_by_the_next_run(world, service, sft_student, finished):
    arguments = world.cache_arguments(sft_student(world.teacher))
    caches = service.workspace.artifacts_of("cache")
    (caches / "die-once").touch()
    first = service.build_teacher_cache(arguments)
    assert finished(service, first.run_id).state == "lost"
    assert len([path for path in caches.glob(".building-*") if path.is_dir()]) == 2, "rollouts and scores stay"
    second = service.build_teacher_cache(arguments)
    status = finished(service, second.run_id)
    assert (status.state, second.run_id == first.run_id) == ("succeeded", False)
    made = caches / status.result["artifacts"]["cache"]
    assert (made / "taken_up").exists(), "the second run found the first one's rollouts"
    assert (made / "shard-00000.parquet").exists(), "and its scores"
    assert not list(caches.glob(".building-*"))


def test_sigterm_ends_a_queued_run_that_can_go_on(world, service, busy_machine, until, finished):
    run_id = service.start_distillation(world.start_arguments()).run_id
    until(service, run_id, lambda status: status.queue_position == 1)
    worker_of(run_id).terminate()
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "worker_terminated")


def test_a_full_disk_ends_a_run_with_the_amounts_and_a_way_on(world, service, finished):
    overrides = {"sft.optimizer.learning_rate": 28}
    run_id = service.start_distillation(world.start_arguments(overrides=overrides)).run_id
    status = finished(service, run_id)
    assert (status.state, status.error.code) == ("failed", "not_enough_disk")
    assert re.search(r"this phase needs about \d\S* \wiB in all, \d\S* \wiB are free", status.error.cause)
    assert status.next_action.call_text() == f"Call resume_run(run_id='{run_id}')"
    assert service.resume(run_id).state == "queued"
    assert finished(service, run_id).error.code == "not_enough_disk"
    assert service.store.view(run_id).attempt == 2


def test_a_phase_larger_than_the_disk_is_not_begun(tmp_path):
    with pytest.raises(ResourceError, match=r"not_enough_disk.*sft writes up to 1.02e\+03 TiB"):
        require_disk(tmp_path, 1 << 50, "sft")
    require_disk(tmp_path, 1, "sft")
