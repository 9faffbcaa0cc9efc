"""What `get_run_metrics` says of a run, from its journal."""

import pytest

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import GetRunMetrics
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import JOURNAL_FILE, run_directory
from opd_mcp.store.series import thinned


@pytest.fixture
def run(world, service, busy_machine, until):
    """A queued run whose journal a test writes; answers its id and a function that writes a phase's metrics."""
    run_id = service.start_distillation(world.start_arguments()).run_id
    # The worker opens the journal and then waits for its lease without writing.
    until(service, run_id, lambda status: status.queue_position is not None)

    def write(phase, **columns):
        with JournalWriter(run_directory(service.workspace, run_id) / JOURNAL_FILE, attempt=1) as journal:
            journal.append("phase", {"phase": phase, "event": "started"})
            for step, values in enumerate(zip(*columns.values(), strict=True), start=1):
                journal.append("metric", {"step": step, "values": dict(zip(columns, values, strict=True))})

    yield run_id, write
    service.cancel(run_id)


def metrics(service, run_id, **arguments):
    return service.run_metrics(GetRunMetrics(run_ids=[run_id], **arguments))


def test_series_are_by_phase_and_thinned_out(service, run):
    run_id, write = run
    write("sft", loss=[2.0, 1.0])
    write("distill", loss=[1 / step for step in range(1, 401)], kl=[0.5] * 400)
    [found] = metrics(service, run_id, max_points=10).runs
    series = {item.key: item for item in found.series}
    assert list(series) == ["distill.kl", "distill.loss", "sft.loss"]
    assert series["sft.loss"].values == [2.0, 1.0]
    loss = series["distill.loss"]
    assert (len(loss.values), loss.points, loss.steps[-1], loss.trend) == (10, 400, 400, "down")
    assert loss.last == loss.values[-1] == pytest.approx(1 / 400)
    assert (loss.low, loss.high) == (1 / 400, 1.0)


def test_a_key_names_one_series_or_that_of_every_phase(service, run):
    run_id, write = run
    write("sft", loss=[2.0, 1.0])
    write("distill", loss=[1.0, 0.5])
    assert [item.key for item in metrics(service, run_id, keys=["sft.loss"]).runs[0].series] == ["sft.loss"]
    assert len(metrics(service, run_id, keys=["loss"]).runs[0].series) == 2
    with pytest.raises(ArgumentError) as caught:
        metrics(service, run_id, keys=["los"])
    assert "loss" in caught.value.nearest


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 0.9, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1], "still falls"),
        ([1.0, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], "level"),
        ([0.1, 0.1, 0.1, 0.1, 0.2, 0.4, 0.6, 0.9], "rises"),
        ([1.0, 0.5], "too few"),
        ([1.0, float("nan"), 0.5, 0.4], "not finite at step 2 (1 of 4 steps)"),
        ([1.0, 0.5, float("nan"), float("nan")], "stopped being finite at step 3"),
    ],
)
def test_the_diagnosis_says_where_the_objective_goes(service, run, values, said):
    run_id, write = run
    write("distill", loss=values)
    diagnosis = metrics(service, run_id).runs[0].diagnosis
    assert said in diagnosis


@pytest.mark.parametrize(
    ("level", "verdict", "converged"), [(0.02, None, True), (1.2, None, False), (0.02, "worse", False)]
)
def test_converged_is_said_of_a_small_reverse_kl_without_a_loss_only(service, run, level, verdict, converged):
    run_id, write = run
    write("distill", reverse_kl_k1=[2.0, 1.5, level, level, level, level, level, level])
    if verdict is not None:
        told = {"judgement": verdict, "sentence": "s", "next_action": {}}
        with JournalWriter(run_directory(service.workspace, run_id) / JOURNAL_FILE, attempt=1) as journal:
            journal.append("result", {"verdict": told})
    diagnosis = metrics(service, run_id).runs[0].diagnosis
    assert ("converged at these settings" in diagnosis) == converged
    assert ("stopped, not converged" in diagnosis) != converged


def test_settings_that_differ_are_named(world, service, busy_machine):
    slow, fast = (
        service.start_distillation(world.start_arguments(overrides={"distill.optimizer.learning_rate": rate})).run_id
        for rate in (1e-3, 1e-2)
    )
    report = service.run_metrics(GetRunMetrics(run_ids=[slow, fast]))
    assert report.differences == {"distill.optimizer.learning_rate": [1e-3, 1e-2]}
    for run_id in (slow, fast):
        service.cancel(run_id)


def test_an_answer_has_a_budget_and_says_what_it_left_out(service, run):
    run_id, write = run
    write("distill", **{f"metric_{number}": [1.0] * 200 for number in range(8)}, loss=[1.0] * 200)
    report = metrics(service, run_id, max_points=200)
    kept = [item.key for item in report.runs[0].series]
    assert "distill.loss" in kept
    assert len(kept) + len(report.dropped) == 9
    assert sum(len(item.values) for item in report.runs[0].series) <= 1200


def test_thinning_keeps_the_mean():
    steps = list(range(1, 402))
    steps, values = thinned(steps, [float(step % 2) for step in steps], 41)
    assert steps[-1] == 401
    assert all(abs(value - 0.5) < 0.06 for value in values[:-1])


def test_what_an_attempt_went_back_behind_counts_once(service, run):
    """Attempt 1 told steps 1 to 5 and died; attempt 2 goes on after step 3, and its steps count from there."""
    run_id, _ = run
    file = service.workspace.run(run_id) / "journal.jsonl"
    with JournalWriter(file, attempt=1) as journal:
        journal.append("phase", {"phase": "distill", "event": "started"})
        for step in range(1, 6):
            journal.append("metric", {"step": step, "values": {"loss": float(step)}})
    with JournalWriter(file, attempt=2) as journal:
        journal.append("phase", {"phase": "distill", "event": "started"})
        journal.append("phase", {"phase": "distill", "event": "resumed", "step": 3})
        assert metrics(service, run_id).runs[0].series[0].steps == [1, 2, 3]
        assert service.store.view(run_id).metrics["loss"].last == 3.0
        journal.append("metric", {"step": 4, "values": {"loss": 40.0}})
    series = metrics(service, run_id).runs[0].series[0]
    assert (series.steps, series.values) == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 40.0])
    assert service.store.view(run_id).metrics["loss"].last == 40.0


def test_a_phase_that_begins_anew_replaces_what_an_earlier_attempt_told(service, run):
    run_id, _ = run
    file = service.workspace.run(run_id) / "journal.jsonl"
    for attempt, steps in ((1, 4), (2, 2)):
        with JournalWriter(file, attempt=attempt) as journal:
            journal.append("phase", {"phase": "sft", "event": "started"})
            for step in range(1, steps + 1):
                journal.append("metric", {"step": step, "values": {"loss": float(attempt)}})
    series = metrics(service, run_id).runs[0].series[0]
    assert (series.steps, series.values) == ([1, 2], [2.0, 2.0])
