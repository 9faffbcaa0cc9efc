"""The index while it is in use: deleted, swapped, damaged or locked, it loses no run and starts none twice."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from opd_mcp.schemas.errors import PathError, ResourceError
from opd_mcp.schemas.requests import ListArtifacts
from opd_mcp.store.index import Index
from opd_mcp.store.runs import run_ids
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace


def delete(store: Store, earlier: Path) -> None:
    for file in store.workspace.root.glob("opd.sqlite*"):
        file.unlink()


def delete_only_the_main_file(store: Store, earlier: Path) -> None:
    store.workspace.index.unlink()


def delete_with_note(store: Store, earlier: Path) -> None:
    delete(store, earlier)
    store.workspace.index_note.unlink()


def swap_for_an_earlier_copy(store: Store, earlier: Path) -> None:
    os.replace(earlier, store.workspace.index)


def overwrite_with_an_earlier_copy(store: Store, earlier: Path) -> None:
    store.workspace.index.write_bytes(earlier.read_bytes())


def swap_for_an_empty_file(store: Store, earlier: Path) -> None:
    store.workspace.index.unlink()
    store.workspace.index.touch()


def swap_for_another_workspaces(store: Store, earlier: Path) -> None:
    other = Store(Workspace(store.workspace.root.with_name("other")))
    os.replace(other.workspace.index, store.workspace.index)


def swap_for_noise(store: Store, earlier: Path) -> None:
    store.workspace.index.write_bytes(b"no database " * 1000)


MISHAPS = [
    delete,
    delete_only_the_main_file,
    delete_with_note,
    swap_for_an_earlier_copy,
    overwrite_with_an_earlier_copy,
    swap_for_an_empty_file,
    swap_for_another_workspaces,
    swap_for_noise,
]


def publish(store: Store, name: str) -> None:
    building = store.artifacts.new_building_directory("cache")
    (building / "file").write_text(name)
    store.artifacts.publish("cache", building, name, f"key of {name}")


@pytest.fixture
def earlier(store, make_record, tmp_path) -> Path:
    """A copy of the index from the time when it knew one run; since then another run and an artifact were added."""
    store.start_once(make_record("first"))
    copy = Path(shutil.copy(store.workspace.index, tmp_path / "earlier.sqlite"))
    store.start_once(make_record("second"))
    publish(store, "cache-1")
    return copy


@pytest.mark.parametrize("mishap", MISHAPS)
def test_nothing_is_lost_or_started_twice_under_a_live_store(store, make_record, earlier, mishap):
    other = Store(store.workspace)
    before = [row.run_id for row in store.list_runs().rows]
    assert len(before) == 2
    mishap(store, earlier)
    assert store.start_once(make_record("second")).reused
    assert [row.run_id for row in other.list_runs().rows] == before
    assert [row.artifact_id for row in other.index.artifacts()] == ["cache-1"]


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_list_is_whole_at_once(store, earlier, mishap):
    mishap(store, earlier)
    assert store.list_runs().total == 2


@pytest.mark.parametrize("mishap", MISHAPS)
def test_what_is_written_next_does_not_hide_the_rest(store, earlier, mishap):
    """As a worker does, which publishes without having listed anything."""
    mishap(store, earlier)
    publish(store, "cache-2")
    assert [row.artifact_id for row in Store(store.workspace).index.artifacts()] == ["cache-1", "cache-2"]
    assert store.list_runs().total == 2


SWAPS = [swap_for_an_earlier_copy, swap_for_an_empty_file, swap_for_another_workspaces, swap_for_noise]


@pytest.mark.parametrize("mishap", [*SWAPS, delete_only_the_main_file])
def test_a_main_file_that_is_swapped_under_its_log_is_not_read_with_it(store, make_record, earlier, mishap):
    """Another process has the index open, so the log stays: it holds the right generation, over the wrong rows."""
    with closing(sqlite3.connect(store.workspace.index)) as other:
        other.execute("SELECT count(*) FROM runs").fetchall()
        for _ in range(2):
            with store.index.writing():
                pass
        assert store.workspace.index.with_name("opd.sqlite-wal").stat().st_size > 0
        mishap(store, earlier)
        assert store.list_runs().total == 2
        assert store.start_once(make_record("second")).reused


CHILD = """
import sys
from pathlib import Path
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace
store = Store(Workspace(Path({root!r})))
for line in sys.stdin:
    started = store.start_once(RunRecord.from_json(line))
    print(started.run_id, started.reused, flush=True)
"""


def test_two_processes_agree_whoever_deletes_the_index(store, make_record, python, earlier):
    command = python(CHILD.format(root=str(store.workspace.root)))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def ask_child(teacher: str) -> list[str]:
            child.stdin.write(make_record(teacher).to_json() + "\n")
            child.stdin.flush()
            return child.stdout.readline().split()

        run_id, reused = ask_child("third")
        assert reused == "False"
        delete(store, earlier)
        assert store.start_once(make_record("third")).run_id == run_id
        fourth = store.start_once(make_record("fourth")).run_id
        delete(store, earlier)
        assert ask_child("fourth") == [fourth, "True"]
        subprocess.run(["rm", str(store.workspace.index)], check=True)
        assert ask_child("first")[1] == "True"
        child.stdin.close()
    assert store.list_runs().total == 4


def test_under_load_every_request_keeps_its_one_run(store, make_record):
    """Three threads start the same six requests, while the index is deleted again and again."""
    over, errors = threading.Event(), []

    def start_all() -> None:
        try:
            for number in [*range(6), *range(6)]:
                Store(store.workspace).start_once(make_record(f"teacher-{number}"))
                store.list_runs()
        except Exception as error:
            errors.append(error)

    def delete_often() -> None:
        while not over.wait(0.05):
            for name in ("opd.sqlite", "opd.sqlite-wal"):
                (store.workspace.root / name).unlink(missing_ok=True)

    deleter = threading.Thread(target=delete_often)
    starters = [threading.Thread(target=start_all) for _ in range(3)]
    for thread in (deleter, *starters):
        thread.start()
    for thread in starters:
        thread.join()
    over.set()
    deleter.join()
    assert errors == []
    assert len(run_ids(store.workspace)) == store.list_runs().total == 6


def test_a_service_finds_its_run_again(world, service, busy_machine):
    run = service.start_distillation(world.start_arguments())
    for file in service.workspace.root.glob("opd.sqlite*"):
        file.unlink()
    again = service.start_distillation(world.start_arguments())
    assert (again.run_id, again.reused) == (run.run_id, True)
    assert [row.run_id for row in service.list_runs().rows] == [run.run_id]
    assert service.list_artifacts(ListArtifacts()).total == len(service.store.artifacts.list())
    service.cancel(run.run_id)


def test_a_run_that_the_index_never_heard_of_is_added_at_the_next_start(store, make_record, earlier):
    [newest, _] = [row.run_id for row in store.list_runs().rows]
    with store.index.writing() as database:
        database.execute("DELETE FROM runs WHERE run_id = ?", (newest,))
        database.execute("DELETE FROM artifacts")
    reopened = Store(store.workspace)
    assert reopened.list_runs().total == 2
    assert len(reopened.index.artifacts()) == 1


def test_an_index_that_another_program_holds_is_busy_and_says_so(store, make_record):
    impatient = Index(store.workspace.index, store.workspace.index_note, lambda database: [], busy_seconds=0.05)
    with closing(sqlite3.connect(store.workspace.index, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(ResourceError, match="workspace_busy"), impatient.writing():
            pass
        assert impatient.runs() == []
    with store.index.writing(), pytest.raises(ResourceError, match="workspace_busy"), impatient.writing():
        pass
    with impatient.writing():
        pass


def test_a_moved_workspace_is_named(store, earlier):
    moved = store.workspace.root.with_name("moved")
    store.workspace.root.rename(moved)
    with pytest.raises(PathError, match="workspace_missing"):
        store.list_runs()
    assert Store(Workspace(moved)).list_runs().total == 2


def test_a_reader_does_not_drop_the_lock_of_a_writer_in_the_same_process(tmp_path):
    """Closing any descriptor of a file drops a process's locks on it: another process would write at the same time."""
    index = Store(Workspace(tmp_path)).index
    begin = f"import sqlite3; sqlite3.connect({str(index.path)!r}, timeout=0, isolation_level=None)"
    command = [sys.executable, "-c", f"{begin}.execute('BEGIN IMMEDIATE')"]

    def read() -> None:
        index.runs()

    with index.writing():
        reader = threading.Thread(target=read)
        reader.start()
        reader.join()
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "database is locked" in other.stderr
    assert subprocess.run(command, check=False).returncode == 0
