"""A full disk at any write leaves what was there before, and nothing half-made."""

import os
import sqlite3
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.plans import ConsistencyVerdict, Plan
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs
from opd_mcp.store import store as store_module
from opd_mcp.store.artifacts import ARTIFACT_FILE
from opd_mcp.store.journal import JournalWriter, read_journal
from opd_mcp.store.runs import RESERVE_BYTES, RESERVE_FILE, use_reserve
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, read_plan, save_plan


def write_points(disk, work) -> int:
    """Run `work` with a disk that is full from the n-th write on, until it succeeds; the number of failures."""
    for full_at in range(1, 200):
        with disk(full_at) as state:
            try:
                work()
            except OSError:
                continue
            finally:
                points = state.calls
        assert points < full_at
        return full_at - 1
    raise AssertionError("it never succeeded")


def test_a_journal_keeps_whole_lines_and_goes_on_when_there_is_room(tmp_path: Path, disk):
    file = tmp_path / "journal.jsonl"
    with JournalWriter(file, attempt=1) as journal:
        journal.append("state", {"state": "queued"})
        points = write_points(disk, lambda: journal.append("alert", {"code": "a", "message": "b" * 100}))
        assert points == 2
        journal.append("state", {"state": "running"})
    assert [record.type for record in read_journal(file)] == ["state", "alert", "state"]
    assert [record.seq for record in read_journal(file)] == [1, 2, 3]


def test_a_start_is_whole_or_never_was(store, make_record, disk):
    def start() -> None:
        store.start_once(make_record()).lock.release()

    assert write_points(disk, start) >= 8
    assert store.list_runs().total == 1
    assert [path.name for path in store.workspace.runs.iterdir()] == [store.latest_run()]


def test_a_full_index_takes_the_run_back(store, make_record, monkeypatch):
    def full(database: sqlite3.Connection, row: object) -> None:
        database.execute("PRAGMA max_page_count = 1")
        database.execute("INSERT INTO artifacts VALUES (?, '', '', '', '', 0)", ("x" * 10**6,))

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "insert_run", full)
        with pytest.raises(ResourceError, match="not_enough_disk"):
            store.start_once(make_record())
    assert not list(store.workspace.runs.iterdir())
    assert store.start_once(make_record()).lock is not None


def test_an_artifact_is_published_whole_or_not_at_all(store, disk):
    building = store.artifacts.new_building_directory("cache")
    (building / "rows").write_text("rows")
    folder = store.workspace.artifacts_of("cache")

    def publish() -> None:
        store.artifacts.publish("cache", building, "cache-1", "key")

    for full_at in range(1, 50):
        with disk(full_at):
            try:
                publish()
                break
            except OSError:
                published = (folder / "cache-1").exists()
                assert published == (not building.exists())
                if published:  # only the name was not yet durable
                    assert store.artifacts.find_made("cache", "cache-1", "key") is not None
                    return
    assert (folder / "cache-1" / ARTIFACT_FILE).is_file()


def test_a_plan_is_the_one_before_or_the_new_one(workspace, disk):
    plan = Plan(
        plan_id="plan-0a1b2c",
        method="lightning",
        inputs=RunInputs(),
        recipe=Recipe(),
        phases=[],
        consistency=ConsistencyVerdict(status="unknown"),
        estimates=[],
        next_action=NextAction(why="before"),
    )
    arguments = PlanDistillation(student="a", teacher="b", prompts="c")
    save_plan(workspace, plan, arguments)
    now = plan.model_copy(update={"next_action": NextAction(why="after")})
    for full_at in range(1, 50):
        with disk(full_at):
            try:
                save_plan(workspace, now, arguments)
                break
            except OSError:
                assert read_plan(workspace, plan.plan_id).next_action.why in ("before", "after")
    assert read_plan(workspace, plan.plan_id) == now
    assert not list(workspace.plans.glob(".*"))


def test_a_run_has_bytes_in_reserve_to_say_how_it_ended(store, make_record):
    directory = store.workspace.run(store.start_once(make_record()).run_id)
    assert (directory / RESERVE_FILE).stat().st_size == RESERVE_BYTES
    use_reserve(directory)
    use_reserve(directory)
    assert not (directory / RESERVE_FILE).exists()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until there is no room."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


def test_on_a_real_full_disk_a_run_ends_with_a_record_and_others_stay(small_disk: Path, make_record):
    store = Store(Workspace(small_disk / "home"))
    started = store.start_once(make_record())
    directory = store.workspace.run(started.run_id)
    fill(small_disk / "filler")
    with pytest.raises((OSError, ResourceError), match=r"No space left|not_enough_disk"):
        store.start_once(make_record("another"))
    use_reserve(directory)
    with JournalWriter(directory / "journal.jsonl", attempt=1) as journal:
        journal.append("error", {"code": "not_enough_disk", "cause": "full", "fix": "free some"})
        journal.append("state", {"state": "failed"})
    started.lock.release()
    (small_disk / "filler").unlink()
    again = Store(store.workspace)
    assert [row.run_id for row in again.list_runs().rows] == [started.run_id]
    assert again.view(started.run_id).error.code == "not_enough_disk"
    assert again.resume(started.run_id).attempt == 2
