"""The journal: nothing acknowledged is lost, nothing torn is believed, nothing damaged goes unnoticed."""

import math
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.schemas.errors import IntegrityError, RunError
from opd_mcp.store import journal as module
from opd_mcp.store.journal import (
    JournalReader,
    JournalRecord,
    JournalWriter,
    encode_record,
    next_attempt,
    read_journal,
    utc_now,
)
from opd_mcp.store.runs import RunLock


@pytest.fixture
def journal(tmp_path):
    """A journal of five metric records."""
    path = tmp_path / "journal.jsonl"
    with JournalWriter(path, attempt=1) as writer:
        for step in range(1, 6):
            writer.append("metric", {"step": step, "values": {"loss": 1 / step}}, durable=False)
    return path


def steps(records):
    return [record.data["step"] for record in records]


def test_what_was_written_is_read(journal):
    records = read_journal(journal)
    assert steps(records) == [1, 2, 3, 4, 5]
    assert [record.seq for record in records] == [1, 2, 3, 4, 5]
    assert {record.attempt for record in records} == {1}
    assert records[0].time.endswith("Z")


def test_a_missing_journal_is_empty(tmp_path):
    assert read_journal(tmp_path / "nothing") == []
    assert next_attempt(tmp_path / "nothing") == 1


def test_a_reader_sees_only_what_is_new(journal):
    reader = JournalReader(journal)
    assert len(reader.new_records()) == 5
    assert reader.new_records() == []
    with JournalWriter(journal, attempt=1) as writer:
        writer.append("alert", {"code": "a", "message": "b"})
    assert [record.type for record in reader.new_records()] == ["alert"]


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_is_ignored_and_the_next_attempt_writes_on(journal, cut):
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-cut])
    reader = JournalReader(journal)
    assert steps(reader.new_records()) == [1, 2, 3, 4]
    assert reader.damage is None
    with JournalWriter(journal, next_attempt(journal)) as writer:
        writer.append("metric", {"step": 50, "values": {}})
    assert steps(reader.new_records()) == [50]
    assert [(record.attempt, record.seq) for record in read_journal(journal)][-2:] == [(1, 4), (2, 5)]


def test_a_torn_line_that_is_cut_off_while_it_is_read_is_no_damage(journal, monkeypatch):
    """On a full disk a writer cuts its torn line off and later writes another one there."""
    whole, lines = journal.read_bytes(), module._whole_lines
    with JournalWriter(journal, attempt=2) as writer:
        for step in (6, 7):
            writer.append("metric", {"step": step, "values": {"loss": 0.1}})
    after = journal.read_bytes()
    journal.write_bytes(whole)

    def overtaken(file):
        yield from lines(file)
        journal.write_bytes(after)
        sixth, seventh = after[len(whole) :].splitlines()
        yield from (b"{torn" + sixth[5:], seventh)

    reader = JournalReader(journal)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_whole_lines", overtaken)
        assert steps(reader.new_records()) == [1, 2, 3, 4, 5]
    assert steps(reader.new_records()) == [6, 7]
    assert reader.damage is None


def test_zeros_after_a_power_loss_are_torn(journal):
    with journal.open("ab") as file:
        file.write(bytes(100) + b"\n")
    assert steps(read_journal(journal)) == [1, 2, 3, 4, 5]
    with JournalWriter(journal, 2) as writer:
        writer.append("metric", {"step": 6, "values": {}})
    assert steps(read_journal(journal)) == [1, 2, 3, 4, 5, 6]


def test_a_line_that_is_still_being_written_is_read_once_whole(journal):
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-30])
    reader = JournalReader(journal)
    assert len(reader.new_records()) == 4
    journal.write_bytes(whole)
    assert steps(reader.new_records()) == [5]
    assert reader.damage is None


def test_a_damaged_middle_is_named_by_its_line(journal):
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"0.3", b"9.3")
    journal.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=r"journal\.jsonl line 3") as caught:
        read_journal(journal)
    assert caught.value.code == "damaged_journal"
    reader = JournalReader(journal)
    assert steps(reader.new_records()) == [1, 2, 4, 5], "the rest is still shown"
    assert reader.damage is not None


def test_a_removed_line_is_noticed(journal):
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(IntegrityError, match="line 3: record 4 follows record 2"):
        read_journal(journal)


def test_a_journal_that_became_shorter_is_noticed(journal):
    reader = JournalReader(journal)
    reader.new_records()
    journal.write_bytes(journal.read_bytes()[:50])
    assert reader.new_records() == []
    assert reader.damage is not None


def test_an_older_attempt_that_wakes_up_late_is_fenced_off(journal):
    late = JournalWriter(journal, attempt=1)
    with JournalWriter(journal, next_attempt(journal)) as writer:
        late.append("metric", {"step": -1, "values": {}})  # before the new attempt's first line: history
        writer.append("metric", {"step": 6, "values": {}})
        for write in (late.sync, late.check_fence, lambda: late.append("metric", {"step": -2, "values": {}})):
            with pytest.raises(RunError, match="attempt_superseded"):
                write()
        # A process may sleep between its look and its write: that one line is there, and nobody believes it.
        record = JournalRecord(6, 1, utc_now(), "metric", {"step": -3, "values": {}})
        with journal.open("ab") as file:
            file.write(encode_record(record))
        writer.append("metric", {"step": 7, "values": {}})
    late.close()
    assert steps(read_journal(journal)) == [1, 2, 3, 4, 5, -1, 6, 7]


@pytest.mark.parametrize("replaced", ["journal.jsonl", "lock"])
def test_a_writer_whose_lock_or_journal_was_replaced_writes_nothing(tmp_path, replaced):
    lock = RunLock.acquire(tmp_path)
    journal = tmp_path / "journal.jsonl"
    with lock, JournalWriter(journal, 1, lock.holds) as writer:
        writer.append("state", {"state": "running"})
        copy = tmp_path / "copy"
        shutil.copy(tmp_path / replaced, copy)
        copy.rename(tmp_path / replaced)
        with pytest.raises(RunError, match="attempt_superseded"):
            writer.append("state", {"state": "succeeded"})
    assert [record.data["state"] for record in read_journal(journal)] == ["running"]


def test_threads_may_share_a_writer(tmp_path):
    with JournalWriter(tmp_path / "j", 1) as writer, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda step: writer.append("metric", {"step": step, "values": {}}, durable=False), range(400)))
    records = read_journal(tmp_path / "j")
    assert [record.seq for record in records] == list(range(1, 401))
    assert sorted(steps(records)) == list(range(400))


def test_a_state_that_cannot_follow_is_a_mistake_of_the_program(tmp_path):
    with JournalWriter(tmp_path / "j", 1) as writer:
        writer.append("state", {"state": "running"})
        writer.append("state", {"state": "failed"})
        with pytest.raises(ValueError, match="from failed to succeeded"):
            writer.append("state", {"state": "succeeded"})


def test_numbers_that_are_not_finite_become_absent(tmp_path):
    with JournalWriter(tmp_path / "j", 1) as writer:
        writer.append("metric", {"step": 1, "values": {"loss": math.nan, "norm": math.inf}})
        writer.append("result", {"kl": [0.5, -math.inf]})
    metric, result = read_journal(tmp_path / "j")
    assert metric.data["values"] == {"loss": None, "norm": None}
    assert result.data == {"kl": [0.5, None]}


@pytest.mark.parametrize(
    ("type", "data"),
    [
        ("state", {"state": "asleep"}),
        ("phase", {"phase": "sft"}),
        ("phase", {"phase": "sft", "event": "resumed"}),
        ("phase", {"phase": "sft", "event": "finished", "cost": 3}),
        ("progress", {"done": "1", "total": 2, "unit": "steps"}),
        ("metric", {"step": 1, "values": {"loss": [1]}}),
        ("metric", {"step": 10**400, "values": {}}),
        ("alert", {"code": "x"}),
        ("error", {"code": "x"}),
    ],
)
def test_a_line_whose_data_is_not_what_its_type_says_is_damage(tmp_path, type, data):
    line = encode_record(JournalRecord(1, 1, "2026-01-01T00:00:00.000Z", type, data))
    (tmp_path / "j").write_bytes(line + encode_record(JournalRecord(2, 1, "2026-01-01T00:00:00.000Z", "result", {})))
    with pytest.raises(IntegrityError, match="line 1"):
        read_journal(tmp_path / "j")


def test_everything_acknowledged_survives_a_kill(tmp_path, python):
    code = f"""
    from pathlib import Path
    from opd_mcp.store.journal import JournalWriter
    writer = JournalWriter(Path({str(tmp_path / "j")!r}), 1)
    for step in range(1, 10**6):
        writer.append("metric", {{"step": step, "values": {{}}}}, durable=step % 10 == 0)
        print(step, flush=True)
    """
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(200)][-1]
        os.kill(process.pid, signal.SIGKILL)
    found = steps(read_journal(tmp_path / "j"))
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= acknowledged


values = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=8), max_size=3)


@settings(max_examples=100)
@given(payloads=st.lists(values, max_size=6))
def test_any_data_comes_back_as_it_was(tmp_path, payloads):
    path = tmp_path / "any.jsonl"
    path.unlink(missing_ok=True)
    with JournalWriter(path, 1) as writer:
        for payload in payloads:
            writer.append("result", payload, durable=False)
    assert [record.data for record in read_journal(path)] == payloads


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_bytes_never_invent_a_record_and_never_stop_the_reader(tmp_path, journal, data):
    original = read_journal(journal)
    content = bytearray(journal.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 300)))
    content[start:end] = data.draw(st.binary(max_size=40))
    mutated = tmp_path / "mutated.jsonl"
    mutated.write_bytes(content)
    reader = JournalReader(mutated)
    found = reader.new_records()
    assert [record for record in original if record in found] == found, "a subsequence of what was written"
    prefix = original[: len(found)]
    assert found == prefix or reader.damage is not None, "what is missing is at the end, or the damage is flagged"
    with JournalWriter(mutated, reader.attempt + 1) as writer:
        writer.append("state", {"state": "running"}, durable=False)
    assert [record.type for record in reader.new_records()] == ["state"]


@settings(max_examples=100)
@given(content=st.binary(max_size=300))
def test_foreign_bytes_hold_no_records(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    assert JournalReader(tmp_path / "foreign").new_records() == []
