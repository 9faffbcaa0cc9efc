"""A run folded from its journal."""

import pytest

from opd_mcp.store.journal import JournalRecord, JournalWriter, encode_record
from opd_mcp.store.run_view import RunView, trend_of
from opd_mcp.store.runs import JOURNAL_FILE, RunLock, create_run


@pytest.fixture
def run(workspace, make_record):
    return create_run(workspace, make_record())


@pytest.fixture
def writer(run):
    with JournalWriter(run / JOURNAL_FILE, 1) as writer:
        yield writer


def test_a_new_run_is_queued_while_somebody_holds_its_lock(run):
    assert RunView(run).refresh().state == "lost"
    with RunLock.acquire(run):
        assert RunView(run).refresh().state == "queued"


def test_a_run_from_start_to_end(run, writer):
    view = RunView(run)
    with RunLock.acquire(run):
        writer.append("state", {"state": "running"})
        writer.append("phase", {"phase": "sft", "event": "reused", "artifact_id": "model-1"})
        writer.append("phase", {"phase": "distill", "event": "started"})
        writer.append("progress", {"done": 3, "total": 10, "unit": "steps"}, durable=False)
        writer.append("metric", {"step": 3, "values": {"loss": 0.5}}, durable=False)
        view.refresh()
        assert (view.state, view.phase, view.phases_done, view.step) == ("running", "distill", ["sft"], 3)
        assert view.progress is not None
        assert (view.progress.done, view.progress.total) == (3, 10)
        assert view.metrics["loss"].last == 0.5
        assert view.artifacts == {"sft": "model-1"}
        cost = {"stage": "distill", "seconds": 2.5, "steps": 10}
        writer.append("phase", {"phase": "distill", "event": "finished", "cost": cost, "artifact_id": "model-2"})
        writer.append("result", {"model": "model-2"})
        writer.append("state", {"state": "succeeded"})
    view.refresh()
    assert (view.state, view.phase, view.phases_done) == ("succeeded", None, ["sft", "distill"])
    assert view.result == {"model": "model-2"}
    assert [cost.seconds for cost in view.costs] == [2.5]
    assert view.started_at is not None
    assert view.finished_at is not None


def test_metrics_are_those_of_the_phase_that_goes_on(run, writer):
    view = RunView(run)
    for phase, values in (
        ("sft", {"loss": 2.0, "mean_logprob": -2.0}),
        ("rollout", {}),
        ("distill", {"loss": 0.1}),
        ("benchmark", {}),
    ):
        writer.append("phase", {"phase": phase, "event": "started"})
        if values:
            writer.append("metric", {"step": 1, "values": values}, durable=False)
        assert {name: trend.last for name, trend in view.refresh().metrics.items()} == values


def test_the_metrics_of_a_phase_outlast_the_runs_end_and_not_its_next_attempt(run, writer):
    writer.append("state", {"state": "running"})
    writer.append("phase", {"phase": "distill", "event": "started"})
    writer.append("metric", {"step": 1, "values": {"loss": 0.1}}, durable=False)
    writer.append("state", {"state": "failed"})
    view = RunView(run).refresh()
    assert view.metrics["loss"].last == 0.1
    with JournalWriter(run / "journal.jsonl", 2) as second:
        second.append("state", {"state": "queued"})
        assert view.refresh().metrics == {}
        second.append("phase", {"phase": "distill", "event": "started"})
        second.append("metric", {"step": 2, "values": {"loss": 0.05}}, durable=False)
    assert view.refresh().metrics["loss"].last == 0.05


def test_a_failure_keeps_its_cause(run, writer):
    writer.append("error", {"code": "bad_number", "cause": "loss is NaN", "fix": "Lower the learning rate."})
    writer.append("state", {"state": "failed"})
    view = RunView(run).refresh()
    assert view.state == "failed"
    assert view.error is not None
    assert view.error.cause == "loss is NaN"


def test_a_new_attempt_forgets_the_old_ones_failure(run, writer):
    writer.append("error", {"code": "bad_number", "cause": "a", "fix": "b"})
    writer.append("state", {"state": "failed"})
    with JournalWriter(run / JOURNAL_FILE, 2) as again, RunLock.acquire(run):
        again.append("state", {"state": "running"})
        view = RunView(run).refresh()
    assert (view.state, view.error, view.finished_at, view.attempt) == ("running", None, None, 2)


def test_a_metric_without_a_finite_value_is_absent_not_invented(run, writer):
    writer.append("metric", {"step": 1, "values": {"loss": 1.0}})
    writer.append("metric", {"step": 2, "values": {"loss": float("nan")}})
    assert RunView(run).refresh().metrics["loss"].last is None


def test_rate_and_eta_come_from_the_progress_of_this_phase(run):
    def line(seq, second, type, data):
        return encode_record(JournalRecord(seq, 1, f"2025-01-01T00:00:{second:02d}.000Z", type, data))

    lines = [
        line(1, 0, "phase", {"phase": "rollout", "event": "started"}),
        line(2, 1, "progress", {"done": 5, "total": 5, "unit": "rows"}),
        line(3, 2, "phase", {"phase": "distill", "event": "started"}),
        line(4, 10, "progress", {"done": 10, "total": 100, "unit": "steps"}),
        line(5, 15, "progress", {"done": 20, "total": 100, "unit": "steps"}),
    ]
    (run / JOURNAL_FILE).write_bytes(b"".join(lines[:4]))
    view = RunView(run).refresh()
    assert view.progress is not None
    assert (view.progress.rate, view.progress.eta_s) == (None, None), "one point has no rate"
    (run / JOURNAL_FILE).write_bytes(b"".join(lines))
    view.refresh()
    assert (view.progress.rate, view.progress.eta_s) == (2.0, 40.0)


def test_damage_becomes_an_alert_and_the_end_is_still_seen(run, writer):
    for number in range(3):
        writer.append("alert", {"code": f"a{number}", "message": "m"})
    writer.append("state", {"state": "succeeded"})
    lines = (run / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    (run / JOURNAL_FILE).write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
    view = RunView(run).refresh().refresh()
    assert view.state == "succeeded"
    assert [alert.code for alert in view.alerts] == ["a0", "a2", "damaged_journal"]


def test_only_the_last_alerts_are_kept_and_all_are_counted(run, writer):
    for number in range(30):
        writer.append("alert", {"code": str(number), "message": "m"}, durable=False)
    view = RunView(run).refresh()
    assert view.alert_count == 30
    assert [alert.code for alert in view.alerts] == [str(number) for number in range(10, 30)]


@pytest.mark.parametrize(
    ("values", "trend"),
    [
        ([1.0, 2.0, 3.0], None),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "up"),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "down"),
        ([1.0] * 10, "flat"),
        ([1.0, 2.0] * 10, "flat"),
    ],
)
def test_a_trend_is_a_difference_beyond_the_noise(values, trend):
    assert trend_of(values) == trend


def test_one_fold_keeps_series_and_device_seconds_through_a_second_attempt(run):
    def line(seq, attempt, second, type, data):
        return encode_record(JournalRecord(seq, attempt, f"2025-01-01T00:00:{second:02d}.000Z", type, data))

    def metric(seq, attempt, second, step, loss):
        return line(seq, attempt, second, "metric", {"step": step, "values": {"loss": loss}})

    lines = [
        line(1, 1, 0, "state", {"state": "queued"}),
        line(2, 1, 2, "state", {"state": "running"}),
        line(3, 1, 2, "phase", {"phase": "sft", "event": "started"}),
        metric(4, 1, 3, 1, 9.0),
        line(5, 1, 4, "phase", {"phase": "distill", "event": "started"}),
        *[metric(5 + step, 1, 5, step, 1 / step) for step in range(1, 31)],
        line(36, 2, 20, "state", {"state": "queued"}),
        line(37, 2, 30, "state", {"state": "running"}),
        line(38, 2, 31, "phase", {"phase": "distill", "event": "started"}),
        line(39, 2, 31, "phase", {"phase": "distill", "event": "resumed", "step": 28}),
        metric(40, 2, 37, 29, None),
    ]
    (run / JOURNAL_FILE).write_bytes(b"".join(lines))
    full, short = RunView(run, keep_series=True).fold(), RunView(run).fold()
    assert full.device_seconds == short.device_seconds == 3.0 + 7.0
    assert full.series == {"sft.loss": {1: 9.0}, "distill.loss": {step: 1 / step for step in range(1, 29)} | {29: None}}
    assert short.series == {"distill.loss": dict(list(full.series["distill.loss"].items())[-20:])}
    assert full.metrics == RunView(run, keep_series=True).refresh().metrics
    assert short.metrics["loss"].last is None
