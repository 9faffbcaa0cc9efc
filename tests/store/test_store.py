"""Starting once, listing, and rebuilding the index."""

import json
import shutil
import sqlite3
import subprocess

import pytest

from opd_mcp.schemas.errors import ArgumentError, IntegrityError, UnknownIdError
from opd_mcp.store.index import Index
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.runs import JOURNAL_FILE, create_run, is_alive, run_ids
from opd_mcp.store.store import Store

START = """
import sys
from pathlib import Path
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace
record = RunRecord.from_json(sys.stdin.readline())
print("ready", flush=True)
sys.stdin.readline()
started = Store(Workspace(Path({root!r}))).start_once(record)
print(started.run_id, started.reused, flush=True)
sys.stdin.readline()
"""


def finish(store, started, state="succeeded"):
    with JournalWriter(store.workspace.run(started.run_id) / JOURNAL_FILE, 1) as writer:
        writer.append("state", {"state": "running"})
        writer.append("state", {"state": state})
    started.lock.release()


def test_a_new_run_is_queued_and_its_lock_is_the_callers(store, make_record):
    started = store.start_once(make_record())
    assert not started.reused
    assert store.view(started.run_id).state == "queued"
    started.lock.release()
    assert store.view(started.run_id).state == "lost"


def test_a_list_says_that_a_journal_is_damaged_instead_of_leaving_out_its_judgement(store, make_record):
    started = store.start_once(make_record())
    journal = store.workspace.run(started.run_id) / JOURNAL_FILE
    with JournalWriter(journal, 1) as writer:
        writer.append("state", {"state": "running"})
        writer.append("result", {"verdict": {"judgement": "worse"}})
        writer.append("state", {"state": "succeeded"})
    started.lock.release()
    assert store.list_runs().rows[0].note == "worse"

    journal.write_bytes(journal.read_bytes().replace(b"worse", b"morse"))
    [row] = Store(store.workspace).list_runs().rows
    assert (row.state, row.note) == ("succeeded", "journal damaged")


def test_an_identical_request_finds_the_active_run(store, make_record):
    first = store.start_once(make_record("a"))
    again, other = store.start_once(make_record("a")), store.start_once(make_record("b"))
    assert (again.run_id, again.reused) == (first.run_id, True)
    assert not other.reused
    assert run_ids(store.workspace) == sorted([first.run_id, other.run_id])


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", None])
def test_a_run_that_ended_or_was_lost_does_not_stop_a_new_one(store, make_record, state):
    first = store.start_once(make_record())
    if state is None:
        first.lock.release()
    else:
        finish(store, first, state)
    assert not store.start_once(make_record()).reused


def test_eight_identical_starts_from_eight_processes_give_one_run(workspace, make_record, python):
    command = python(START.format(root=str(workspace.root)))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(8)]
    try:
        for process in processes:
            process.stdin.write(make_record().to_json() + "\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.readline().split() for process in processes]
        (run_id,) = {run_id for run_id, _ in answers}
        assert sorted(reused for _, reused in answers) == ["False"] + ["True"] * 7
        assert run_ids(workspace) == [run_id]
        assert is_alive(workspace.run(run_id))
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0] * 8
    assert Store(workspace).view(run_id).state == "lost"


def test_a_start_that_fails_leaves_nothing(store, make_record, monkeypatch):
    monkeypatch.setattr("opd_mcp.store.store.insert_run", lambda database, row: database.execute("nonsense"))
    with pytest.raises(sqlite3.OperationalError):
        store.start_once(make_record())
    assert list(store.workspace.runs.iterdir()) == []


def test_runs_are_listed_newest_first_by_state_and_kind(store, make_record):
    a = store.start_once(make_record("a", created_at="2025-01-01T00:00:00.000Z"))
    b = store.start_once(make_record("b", created_at="2025-01-02T00:00:00.000Z", kind="sft"))
    c = store.start_once(make_record("c", created_at="2025-01-03T00:00:00.000Z"))
    finish(store, b)
    c.lock.release()

    def listed(**filters):
        return [(row.run_id, row.state) for row in store.list_runs(**filters).rows]

    assert listed() == [(c.run_id, "lost"), (b.run_id, "succeeded"), (a.run_id, "queued")]
    assert listed(state="succeeded") == [(b.run_id, "succeeded")]
    assert listed(kind="distill", state="queued") == [(a.run_id, "queued")]
    assert store.latest_run() == c.run_id
    assert store.list_runs().rows[0].teacher == "c"


def test_pages_follow_each_other_without_gap_or_repeat(store, make_record):
    for number in range(7):
        store.start_once(make_record(f"t{number}", created_at=f"2025-01-01T00:00:0{number // 2}.000Z")).lock.release()
    seen, cursor = [], None
    while True:
        page = store.list_runs(limit=3, cursor=cursor)
        assert page.total == 7
        seen += [row.run_id for row in page.rows]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == [row.run_id for row in store.list_runs(limit=100).rows]
    assert len(set(seen)) == 7


@pytest.mark.parametrize("cursor", ["page-2", "a/b", "2026-08-01T10:00:00.000Z/", "2026-08-01T10:00:00.000Z/../x"])
def test_a_foreign_cursor_is_refused(store, cursor):
    with pytest.raises(ArgumentError) as caught:
        store.list_runs(cursor=cursor)
    assert caught.value.code == "invalid_argument"


def test_an_empty_workspace_has_no_runs(store):
    assert store.list_runs().total == 0
    assert store.latest_run() is None
    with pytest.raises(UnknownIdError):
        store.view("latest")


def test_a_removed_run_directory_is_gone_from_the_list(store, make_record):
    started = store.start_once(make_record())
    started.lock.release()
    shutil.rmtree(store.workspace.run(started.run_id))
    assert store.list_runs().total == 0
    assert store.latest_run() is None
    assert not store.start_once(make_record()).reused


def rows(store):
    return store.index.runs(), store.index.artifacts()


@pytest.fixture
def full_store(store, make_record):
    """A store with a finished, a lost and a queued run and two artifacts."""
    finish(store, store.start_once(make_record("a")), "failed")
    store.start_once(make_record("b", kind="sft")).lock.release()
    store.start_once(make_record("c"))
    for kind in ("cache", "model"):
        building = store.artifacts.new_building_directory(kind)
        (building / "file").write_text(kind)
        store.artifacts.publish(kind, building, f"{kind}-1", "key", run_id="run")
    store.list_runs()
    return store


def test_the_index_rebuilt_from_the_directories_equals_the_original(full_store):
    before = rows(full_store)
    assert full_store.rebuild() == []
    assert rows(full_store) == before


def test_a_deleted_index_is_rebuilt_on_opening(full_store):
    before = rows(full_store)
    for file in full_store.workspace.root.glob("opd.sqlite*"):
        file.unlink()
    assert rows(Store(full_store.workspace)) == before


def test_a_rebuild_names_what_it_cannot_read_and_keeps_the_rest(full_store, make_record):
    (create_run(full_store.workspace, make_record("d")) / "run.json").write_text("{}")
    problems = full_store.rebuild()
    assert [problem.code for problem in problems] == ["damaged_file"]
    assert full_store.list_runs().total == 3


@pytest.mark.parametrize("damage", [b"no database " * 1000, b"", b"SQLite format 3\0" + bytes(4080)])
def test_a_damaged_index_is_put_aside_and_made_anew_at_start(full_store, damage):
    before = rows(full_store)
    for file in full_store.workspace.root.glob("opd.sqlite-*"):
        file.unlink()
    full_store.workspace.index.write_bytes(damage)
    assert rows(Store(full_store.workspace)) == before
    assert rows(full_store) == before


def test_flipped_pages_of_an_index_are_found_at_start(full_store, make_record):
    for number in range(60):
        full_store.start_once(make_record(f"teacher-{number}")).lock.release()
    before = rows(full_store)
    with sqlite3.connect(full_store.workspace.index) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(full_store.workspace.index.read_bytes())
    content[5000:9000] = bytes(4000)
    full_store.workspace.index.write_bytes(content)
    assert rows(Store(full_store.workspace)) == before
    assert [file.name for file in full_store.workspace.root.glob("opd.sqlite.damaged-*")]


def test_an_index_of_the_first_version_is_brought_forward(full_store):
    before = rows(full_store)
    with sqlite3.connect(full_store.workspace.index) as database:
        database.execute("DROP INDEX artifacts_by_time")
        database.execute("PRAGMA user_version = 1")
    database.close()
    assert rows(Store(full_store.workspace)) == before
    with sqlite3.connect(full_store.workspace.index) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (5,)
    database.close()


def test_an_index_of_a_later_version_is_not_touched(workspace):
    with sqlite3.connect(workspace.index) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(IntegrityError, match="version 99"):
        Index(workspace.index, workspace.index_note, lambda database: []).runs()
    with pytest.raises(IntegrityError, match="later version"):
        Store(workspace)


def test_the_index_is_private_and_in_wal_mode(full_store):
    assert full_store.workspace.index.stat().st_mode & 0o077 == 0
    with sqlite3.connect(full_store.workspace.index) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_readers_work_while_a_writer_is_in_a_transaction(full_store):
    with full_store.index.writing():
        assert len(full_store.index.runs()) == 3


def test_records_without_a_student_are_listed_too(store, make_record):
    record = make_record()
    inputs = record.request.inputs.model_copy(update={"student": None})
    record = record.model_copy(update={"request": record.request.model_copy(update={"inputs": inputs})})
    store.start_once(record)
    assert "student" not in json.loads(store.list_runs().to_json())["rows"][0]


def test_a_reader_that_saw_a_run_end_does_not_shut_it_after_its_resume(store, make_record):
    started = store.start_once(make_record())
    finish(store, started, "failed")
    late = store.view(started.run_id)
    assert late.state == "failed"
    with store.resume(started.run_id).lock:
        store.index.set_final_state(started.run_id, lambda: late.refresh().state)
        assert [row.state for row in store.list_runs().rows] == ["queued"]
        assert store.start_once(make_record()).reused


def test_a_resume_that_fails_half_way_gives_the_lock_back(store, make_record, monkeypatch):
    started = store.start_once(make_record())
    started.lock.release()

    def fail(lock):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("opd_mcp.store.store.begin_attempt", fail)
        with pytest.raises(OSError, match="no space"):
            store.resume(started.run_id)
    assert store.view(started.run_id).state == "lost"
    resumed = store.resume(started.run_id)
    assert (resumed.attempt, store.view(started.run_id).state) == (2, "queued")
    resumed.lock.release()


def test_runs_that_a_rebuilt_index_leaves_out_are_named_on_the_first_page(full_store):
    """Otherwise a lost index would make a damaged run vanish without a word."""
    whole = full_store.list_runs()
    damaged = whole.rows[0].run_id
    (full_store.workspace.run(damaged) / "run.json").write_text("{")
    full_store.workspace.index.unlink()
    found = full_store.list_runs()
    assert found.damaged == [damaged]
    assert [row.run_id for row in found.rows] == [row.run_id for row in whole.rows[1:]]
    artifact = full_store.artifacts.list()[0]
    (artifact.path / "artifact.json").write_text("{")
    full_store.workspace.index.unlink()
    assert full_store.artifacts.census()[1] == [artifact.record.artifact_id]
