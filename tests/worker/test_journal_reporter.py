"""What stages report, as the journal holds it."""

import pytest

from opd_mcp.store.journal import JournalWriter, read_journal
from opd_mcp.store.runs import request_cancel
from opd_mcp.worker.journal_reporter import JournalReporter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reporter(tmp_path, clock):
    with JournalWriter(tmp_path / "journal.jsonl", 1) as journal:
        yield JournalReporter(journal, tmp_path, clock)


def lines(tmp_path, kind: str) -> list[dict]:
    return [record.data for record in read_journal(tmp_path / "journal.jsonl") if record.type == kind]


def test_progress_is_written_twice_a_second_and_at_each_end(tmp_path, reporter, clock):
    for step in range(1, 101):
        clock.now = step * 0.01
        reporter.progress(step, 100, "steps")
    reporter.progress(1, 4, "rows")
    assert [(line["done"], line["unit"]) for line in lines(tmp_path, "progress")] == [
        (1, "steps"),
        (51, "steps"),
        (100, "steps"),
        (1, "rows"),
    ]


def test_metrics_that_are_not_numbers_stay_readable(tmp_path, reporter):
    reporter.metric(3, {"loss": float("nan"), "kl": 0.5})
    assert lines(tmp_path, "metric") == [{"step": 3, "values": {"loss": None, "kl": 0.5}}]


def test_the_same_alert_is_told_a_few_times_only(tmp_path, reporter):
    for _ in range(50):
        reporter.alert("clipped", "Most advantages are clipped.")
    reporter.alert("other", "Something else.")
    assert [line["code"] for line in lines(tmp_path, "alert")] == ["clipped"] * 5 + ["other"]


def test_a_cancel_request_is_seen_and_stays(tmp_path, reporter, clock):
    assert not reporter.should_stop()
    request_cancel(tmp_path)
    assert not reporter.should_stop()
    clock.now = 0.2
    assert reporter.should_stop()
    assert reporter.should_stop()


def test_the_log_has_a_line_with_metrics_now_and_then(reporter, clock, caplog):
    caplog.set_level("INFO")
    reporter.begin("distill")
    for step in range(1, 101):
        clock.now = step * 0.5
        reporter.metric(step, {"loss": 1 / step, "reverse_kl_k1": 0.25})
        reporter.progress(step, 100, "steps")
    reporter.begin("benchmark")
    reporter.progress(1, 8, "prompts")
    assert [line for line in caplog.messages if "loss" not in line or "100/100" in line] == [
        "distill 100/100 steps: loss 0.01, reverse_kl_k1 0.25",
        "benchmark 1/8 prompts",
    ]
    assert [line.split(" steps")[0] for line in caplog.messages[:-1]] == [
        "distill 1/100", "distill 31/100", "distill 61/100", "distill 91/100", "distill 100/100",
    ]  # fmt: skip
