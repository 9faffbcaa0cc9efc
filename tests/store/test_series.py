"""A long journal's fold is kept next to it, and is what a fresh fold gives, or is not believed."""

import json
import os
import random
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.store import run_view
from opd_mcp.store.journal import JournalRecord, encode_record, utc_text
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import JOURNAL_FILE
from opd_mcp.store.series import SERIES_FILE, Points

VALUES = st.none() | st.integers(-5, 5) | st.floats(-2, 2)
EVENTS = st.one_of(
    st.tuples(st.just("state"), st.fixed_dictionaries({"state": st.sampled_from(["queued", "running", "failed"])})),
    st.tuples(
        st.just("phase"),
        st.fixed_dictionaries({"phase": st.sampled_from(["sft", "distill"]), "event": st.just("started")}),
    ),
    st.tuples(
        st.just("phase"),
        st.fixed_dictionaries({"phase": st.just("distill"), "event": st.just("resumed"), "step": st.integers(0, 12)}),
    ),
    st.tuples(
        st.just("phase"),
        st.just(
            {
                "phase": "sft",
                "event": "finished",
                "cost": {"stage": "sft", "seconds": 0.1, "device": "cpu"},
                "artifact_id": "model-1",
            }
        ),
    ),
    st.tuples(
        st.just("progress"),
        st.fixed_dictionaries({"done": st.integers(0, 9), "total": st.just(9), "unit": st.just("steps")}),
    ),
    st.tuples(
        st.just("metric"),
        st.fixed_dictionaries(
            {"step": st.integers(0, 15), "values": st.dictionaries(st.sampled_from(["loss", "kl"]), VALUES)}
        ),
    ),
    st.tuples(
        st.just("alert"), st.fixed_dictionaries({"code": st.sampled_from("abc"), "message": st.text(max_size=3)})
    ),
    st.tuples(st.just("result"), st.dictionaries(st.sampled_from(["x", "y"]), st.floats() | st.text(max_size=2))),
    st.tuples(st.just("error"), st.just({"code": "x", "cause": "y", "fix": "z", "log_tail": ["a"]})),
)
# A higher attempt fences off lines of the ones before it, which come late.
STEPS = st.lists(st.tuples(EVENTS, st.sampled_from([0, 0, 0, 0, 1, -1])), max_size=40)
FEW = settings(max_examples=100)


def lines_of(steps) -> list[bytes]:
    lines, attempt, seq = [], 1, 0
    for number, ((kind, data), change) in enumerate(steps):
        attempt += change == 1
        seq += change != -1
        own = max(attempt - 1, 1) if change == -1 and attempt > 1 else attempt
        seq += own == attempt and change == -1
        lines.append(encode_record(JournalRecord(seq, own, utc_text(1e9 + number), kind, data)))
    return lines


def seen(view: RunView) -> dict:
    """All that a view says, series included."""
    found = {item.name: getattr(view, item.name) for item in fields(view) if item.repr}
    series = {name: list(points.items()) for name, points in view.series.items()}
    return {**found, "series": series, "metrics": view.metrics, "device": view.device_seconds, "pace": list(view._pace)}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's directory whose folds are kept however short the journal is."""
    monkeypatch.setattr(run_view, "KEPT_BYTES", 1)
    directory = tmp_path / "run"
    directory.mkdir(exist_ok=True)
    return directory


def fresh(run: Path, keep_series: bool) -> RunView:
    kept = run / SERIES_FILE
    aside = kept.with_suffix(".aside")
    if kept.exists():
        os.replace(kept, aside)
    view = RunView(run, keep_series).refresh()
    kept.unlink(missing_ok=True)
    if aside.exists():
        os.replace(aside, kept)
    return view


@FEW
@given(steps=STEPS, cuts=st.lists(st.integers(0, 40), max_size=3), keep=st.booleans())
def test_a_kept_fold_is_a_fresh_one(run, steps, cuts, keep):
    lines = lines_of(steps)
    (run / SERIES_FILE).unlink(missing_ok=True)
    for cut in [*sorted(cuts), 40]:
        (run / JOURNAL_FILE).write_bytes(b"".join(lines[:cut]) + b'{"torn')
        expected = seen(fresh(run, keep))
        assert repr(seen(RunView(run, keep).refresh())) == repr(expected)
        assert repr(seen(RunView(run, keep).refresh())) == repr(expected), "and once more, from what was kept"


def metric(seq: int, step: int, value: float | None = 1.0) -> bytes:
    return encode_record(JournalRecord(seq, 1, utc_text(1e9), "metric", {"step": step, "values": {"loss": value}}))


@pytest.fixture
def kept(run) -> Path:
    (run / JOURNAL_FILE).write_bytes(b"".join(metric(n, n, n / 7) for n in range(1, 200)))
    RunView(run).refresh()
    assert (run / SERIES_FILE).exists()
    return run


def test_what_is_kept_is_used(kept, monkeypatch):
    folded = []
    monkeypatch.setattr(RunView, "_fold", lambda view, record: folded.append(record))
    view = RunView(kept, keep_series=True).refresh()
    assert not folded
    assert view.series["run.loss"][199] == 199 / 7
    with (kept / JOURNAL_FILE).open("ab") as journal:
        journal.write(metric(200, 200))
    RunView(kept).refresh()
    assert [record.seq for record in folded] == [200]


def changed(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("file", [SERIES_FILE, JOURNAL_FILE])
def test_a_changed_byte_anywhere_is_found(kept, file):
    data = (kept / file).read_bytes()
    draw = random.Random(0)
    for place in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(30))]:
        (kept / file).write_bytes(changed(data, place))
        expected = seen(fresh(kept, True))
        assert repr(seen(RunView(kept, keep_series=True).refresh())) == repr(expected)
        RunView(kept).refresh()
        (kept / file).write_bytes(data)
        (kept / SERIES_FILE).unlink(missing_ok=True)
        RunView(kept).refresh()


def test_a_shorter_or_another_journal_is_folded_afresh(kept):
    (kept / JOURNAL_FILE).write_bytes(b"".join(metric(n, n) for n in range(1, 50)))
    view = RunView(kept, keep_series=True).refresh()
    assert dict(view.series["run.loss"]) == dict.fromkeys(range(1, 50), 1.0)


def test_a_damaged_journal_is_never_kept(run):
    (run / JOURNAL_FILE).write_bytes(metric(1, 1) + b"broken\n" + metric(2, 2))
    assert [alert.code for alert in RunView(run).refresh().alerts] == ["damaged_journal"]
    assert not (run / SERIES_FILE).exists()
    assert [alert.code for alert in RunView(run).refresh().alerts] == ["damaged_journal"]


def test_where_nothing_can_be_written_nothing_is_kept(run, monkeypatch):
    (run / JOURNAL_FILE).write_bytes(metric(1, 1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opd_mcp.store.series.write_atomic", full)
    assert RunView(run, keep_series=True).refresh().series == {"run.loss": {1: 1.0}}


def test_a_short_journal_needs_no_file(tmp_path):
    (tmp_path / JOURNAL_FILE).write_bytes(metric(1, 1))
    RunView(tmp_path).refresh()
    assert not (tmp_path / SERIES_FILE).exists()


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.floats()), max_size=20), st.integers(-1, 31))
def test_points_are_values_by_step(pairs, rewound):
    plain, points = {}, Points()
    for step, value in sorted(dict(pairs).items()):
        points.append(step, value)
        plain[step] = value if value is not None and abs(value) < float("inf") else None
    assert points == plain
    assert json.dumps(points.not_finite()) == json.dumps([step for step, value in plain.items() if value is None])
    points.rewind(rewound)
    assert dict(points) == {step: value for step, value in plain.items() if step <= rewound}
