"""ETA and next steps, from journals as workers write them."""

import time

import pytest

from opd_mcp.schemas.next_action import plan_call
from opd_mcp.schemas.reports import Verdict
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import Failure, RunRecord
from opd_mcp.server.render.runs import snapshot_text, status_text, unchanged_text
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.run_view import RunView, seconds_of
from opd_mcp.store.runs import RunLock, cancel_requested_at, request_cancel
from opd_mcp.views.next_steps import next_action, run_verdict
from opd_mcp.views.status import costs_by_stage, remaining_seconds, snapshot_of, status_of


@pytest.fixture
def record(service, world, busy_machine) -> RunRecord:
    """A queued run's record with round expectations."""
    run_id = service.start_distillation(world.start_arguments()).run_id
    expected = dict.fromkeys(["generate_responses", "sft", "rollout", "score", "distill", "benchmark"], 10.0)
    service.cancel(run_id)
    return service.store.record(run_id).model_copy(update={"expected_phase_seconds": expected})


@pytest.fixture
def journal(tmp_path):
    """A journal whose run is alive."""
    (tmp_path / "run").mkdir()
    lock = RunLock.acquire(tmp_path / "run")
    with JournalWriter(tmp_path / "run" / "journal.jsonl", 1) as writer:
        yield writer
    lock.release()


def view_of(tmp_path) -> RunView:
    return RunView(tmp_path / "run").refresh()


def finished(journal, phase: str, seconds: float, *, reused: bool = False) -> None:
    journal.append("phase", {"phase": phase, "event": "started"})
    cost = {"stage": phase, "seconds": seconds, "reused": reused}
    journal.append("phase", {"phase": phase, "event": "reused" if reused else "finished", "cost": cost})


def test_the_rest_is_the_current_pace_plus_what_is_expected_of_later_phases(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    finished(journal, "generate_responses", 20.0)
    journal.append("phase", {"phase": "sft", "event": "started"})
    view = view_of(tmp_path)
    started = seconds_of(view.phase_started_at)
    # Responses took twice what was expected, so everything else counts twice.
    assert remaining_seconds(view, record, started + 5.0) == pytest.approx(15.0 + 4 * 20.0)
    journal.append("progress", {"done": 1, "total": 101, "unit": "steps"})
    time.sleep(0.05)
    journal.append("progress", {"done": 2, "total": 101, "unit": "steps"})
    view.refresh()
    now = seconds_of(view.updated_at)
    assert remaining_seconds(view, record, now) == pytest.approx(view.progress.eta_s + 80.0)


def test_what_the_process_takes_to_start_counts_until_the_first_phase_is_done(tmp_path, journal, record):
    slow = record.model_copy(
        update={"expected_phase_seconds": {"process_start": 30.0, **record.expected_phase_seconds}}
    )
    journal.append("state", {"state": "running"})
    assert remaining_seconds(view_of(tmp_path), slow, time.time()) == pytest.approx(90.0)
    journal.append("phase", {"phase": "generate_responses", "event": "started"})
    view = view_of(tmp_path)
    assert remaining_seconds(view, slow, seconds_of(view.phase_started_at) + 25.0) == pytest.approx(15.0 + 50.0)
    finished(journal, "generate_responses", 10.0)
    view = view_of(tmp_path)
    assert remaining_seconds(view, slow, time.time()) == pytest.approx(50.0)


def test_a_reused_phase_says_nothing_about_the_pace(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    finished(journal, "generate_responses", 500.0, reused=True)
    assert remaining_seconds(view_of(tmp_path), record, time.time()) == pytest.approx(50.0)


def test_a_phase_that_counts_in_parts_goes_by_what_is_expected(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    for phase in ("generate_responses", "sft", "rollout", "score", "distill"):
        finished(journal, phase, 10.0)
    journal.append("phase", {"phase": "benchmark", "event": "started"})
    for done in (1, 500):
        journal.append("progress", {"done": done, "total": 500, "unit": "greedy responses of distilled"})
        time.sleep(0.01)
    view = view_of(tmp_path)
    assert remaining_seconds(view, record, seconds_of(view.phase_started_at) + 4.0) == pytest.approx(6.0)


def test_what_is_not_known_is_absent(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    journal.append("phase", {"phase": "sft", "event": "started"})
    view = view_of(tmp_path)
    assert remaining_seconds(view, record.model_copy(update={"expected_phase_seconds": {}}), time.time()) is None
    # Longer than expected and without a pace of its own: nobody can say.
    assert remaining_seconds(view, record, seconds_of(view.phase_started_at) + 11.0) is None
    status = status_of(view, record.model_copy(update={"expected_phase_seconds": {}}), None)
    assert (status.eta_s, status.next_check_s) == (None, 15.0)
    assert "eta_s" not in status.to_dict()


def test_the_next_check_follows_the_eta_within_limits(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    for seconds, check in ((0.1, 5.0), (20.0, 120.0), (1000.0, 300.0)):
        expected = dict.fromkeys(record.expected_phase_seconds, seconds)
        status = status_of(view_of(tmp_path), record.model_copy(update={"expected_phase_seconds": expected}), None)
        assert status.next_check_s == pytest.approx(check, abs=1)


def test_a_finished_run_shows_no_phase_and_no_next_check(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    journal.append("phase", {"phase": "sft", "event": "started"})
    journal.append("state", {"state": "succeeded"})
    status = status_of(view_of(tmp_path), record, None)
    assert (status.phase, status.progress, status.next_check_s, status.eta_s) == (None, None, None, None)
    assert status.elapsed_s >= 0


def test_a_cancel_request_is_pending_until_the_run_has_ended(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    assert status_of(view_of(tmp_path), record, None).cancel_requested is None
    request_cancel(tmp_path / "run")
    status = status_of(view_of(tmp_path), record, None)
    assert status.cancel_requested == cancel_requested_at(tmp_path / "run")
    assert (status.state, status.eta_s, status.next_check_s) == ("running", None, 5.0)
    assert "cancellation is pending" in status.next_action.why
    assert status.next_action.tool == "get_run_status"
    journal.append("state", {"state": "cancelled"})
    ended = status_of(view_of(tmp_path), record, None)
    assert (ended.cancel_requested, ended.next_action.call_text()) == (
        None,
        f"Call resume_run(run_id='{record.run_id}')",
    )


def test_a_run_whose_teacher_was_away_is_to_be_resumed(tmp_path, journal, record):
    failure = Failure(code="teacher_unreachable", cause="No answer.", fix="See that it is up, then call resume_run.")
    journal.append("state", {"state": "running"})
    journal.append("error", failure.to_dict())
    journal.append("state", {"state": "failed"})
    assert next_action(view_of(tmp_path), record).call_text() == f"Call resume_run(run_id='{record.run_id}')"


def test_alerts_pass_through(tmp_path, journal, record):
    journal.append("alert", {"code": "loss_grows", "message": "The loss grows."})
    assert status_of(view_of(tmp_path), record, None).alerts[0].code == "loss_grows"


def test_an_alert_that_a_resumed_run_raises_again_stands_once_at_its_last_time(tmp_path, journal, record):
    told = [("loss_grows", "The loss grows."), ("step_stalled", "5 s"), ("loss_grows", "The loss grows.")]
    for code, message in told:
        journal.append("alert", {"code": code, "message": message})
    with JournalWriter(tmp_path / "run" / "journal.jsonl", 2) as second:
        last = second.append("alert", {"code": "loss_grows", "message": "The loss grows."})
        second.append("alert", {"code": "step_stalled", "message": "7 s"})
    view = view_of(tmp_path)
    assert len(view.alerts) == 5, "the journal keeps them all"
    alerts = status_of(view, record, None).alerts
    assert [(alert.code, alert.message) for alert in alerts] == [
        ("step_stalled", "5 s"),
        ("loss_grows", "The loss grows."),
        ("step_stalled", "7 s"),
    ]
    assert alerts[1].time == last.time


def test_a_phase_that_a_later_attempt_takes_over_counts_once_for_the_pace(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    finished(journal, "generate_responses", 40.0)
    finished(journal, "sft", 20.0)
    finished(journal, "generate_responses", 40.0, reused=True)  # as runs before told it
    finished(journal, "sft", 20.0)
    view = view_of(tmp_path)
    assert [(cost.stage, cost.reused) for cost in costs_by_stage(view)] == [
        ("generate_responses", False),
        ("sft", False),
    ]
    assert remaining_seconds(view, record, time.time()) == pytest.approx(4 * 30.0), "60 s for what 20 s were expected"


def test_each_ended_kind_names_the_next_call(tmp_path, journal, record):
    journal.append("state", {"state": "succeeded"})
    view = view_of(tmp_path)
    calls = {
        "generate": "start_sft",
        "sft": "build_teacher_cache",
        "cache": "start_distillation",
        "distill": "benchmark_student",
    }
    for kind, call in calls.items():
        ended = record.model_copy(update={"request": record.request.model_copy(update={"kind": kind})})
        assert next_action(view, ended).tool == call


def test_a_student_below_its_teacher_is_no_warning(tmp_path, journal, record):
    comparison = {"candidate": "distilled", "baseline": "teacher", "accuracy_difference": [-0.1, -0.15, -0.05]}
    journal.append("state", {"state": "running"})
    journal.append("result", {"comparisons": [comparison], "teacher_row": "teacher"})
    journal.append("state", {"state": "succeeded"})
    verdict = run_verdict(view_of(tmp_path), record)
    assert verdict.judgement == "unknown", "the teacher is no baseline"


@pytest.mark.parametrize(
    ("difference", "judgement"),
    [([-0.1, -0.15, -0.05], "worse"), ([-0.02, -0.06, 0.02], "no_difference"), ([0.1, 0.05, 0.15], "better")],
)
def test_a_result_of_an_earlier_version_is_judged_by_its_comparison(tmp_path, journal, record, difference, judgement):
    comparison = {"candidate": "distilled", "baseline": "sft", "accuracy_difference": difference}
    journal.append("state", {"state": "running"})
    journal.append("result", {"comparisons": [comparison]})
    journal.append("state", {"state": "succeeded"})
    verdict = run_verdict(view_of(tmp_path), record)
    assert verdict.judgement == judgement
    assert verdict.sentence.startswith("accuracy of distilled minus sft: ")


def test_a_success_never_stands_without_its_verdict(tmp_path, journal, record):
    """A loss is said next to the state, with its cause and a next call that repeats the run's own arguments."""
    told = Verdict(judgement="worse", sentence="It lost.", cause="The rate.", next_action=plan_call("Lower it."))
    journal.append("state", {"state": "running"})
    journal.append("result", {"verdict": told.to_dict()})
    journal.append("state", {"state": "succeeded"})
    rate = {"distill.optimizer.learning_rate": 0.3, "distill.steps": 700}
    recipe = resolve_recipe("demo", rate)
    run = record.model_copy(update={"request": record.request.model_copy(update={"recipe": recipe})})
    status = status_of(view_of(tmp_path), run, None)
    lines = status_text(status).splitlines()
    assert ", succeeded (worse)" in lines[0]
    place = lines.index("VERDICT worse: It lost.")
    assert lines[place + 1] == "cause: The rate."
    assert place <= 2, "only the run and its name stand before it"
    assert "succeeded (worse)" in snapshot_text(snapshot_of(view_of(tmp_path), run))
    assert "succeeded (worse)" in unchanged_text(status)
    call = status.next_action
    assert (call.tool, call.missing) == ("plan_distillation", None)
    assert call.why == "Lower it. The call changes 'distill.optimizer.learning_rate' from 0.3 to 0.003."
    assert call.arguments["student"] == record.request.inputs.student.reference
    assert call.arguments["overrides"] == {"distill.optimizer.learning_rate": 3e-3, "distill.steps": 700}
    assert PlanDistillation(**call.arguments).preset == "demo"


def test_a_gain_s_next_round_begins_with_the_student_that_it_made(tmp_path, journal, record):
    told = Verdict(judgement="better", sentence="It gained.", next_action=plan_call("A second round."))
    journal.append("state", {"state": "running"})
    journal.append("result", {"verdict": told.to_dict()})
    journal.append("state", {"state": "succeeded"})
    call = next_action(view_of(tmp_path), record)
    assert call.arguments["student"] == record.run_id
    assert "sft_prompts" not in call.arguments


def test_a_training_that_was_not_measured_is_unknown_with_what_it_alerted(tmp_path, journal, record):
    journal.append("state", {"state": "running"})
    journal.append("alert", {"code": "learning_rate_far", "message": "The rate is far."})
    journal.append("state", {"state": "succeeded"})
    status = status_of(view_of(tmp_path), record, None)
    assert status.result["verdict"]["judgement"] == "unknown"
    assert "cause: learning_rate_far: The rate is far." in status_text(status)
    assert "succeeded (verdict unknown)" in status_text(status)
    assert status.next_action.tool == "benchmark_student"
