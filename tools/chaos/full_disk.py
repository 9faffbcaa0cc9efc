"""Full disks: ENOSPC at every write of the stores, one after another, and at many writes of a worker.

`full_stores` runs this file in a process with failpoints. There each operation meets a full disk at its first write,
its second, and so on (once, or from then on); then the workspace is read, and the operation repeated with room.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chaos.failpoints import ANY, Failpoints, Plan, install
from tools.chaos.worker_kills import Chain

ENOSPC_KINDS: dict[str, tuple[str, ...]] = {
    "generate_responses": ("parquet_write", "artifact_write", "index_update"),
    "sft": ("checkpoint_write", "weights_write", "journal_append", "artifact_write"),
    "rollout": ("parquet_write", "shard_write", "artifact_write"),
    "score": ("parquet_write", "shard_write", "artifact_write", "index_update"),
    "distill": ("checkpoint_write", "weights_write", "journal_append", "artifact_write"),
    "benchmark": ("artifact_write", "index_update"),
}
"""The kinds of writes in each phase of a worker."""


def full_disk_chain(seed: int, phases: tuple[str, ...]) -> Chain:
    """A distillation whose disk is full at each of these phases' kinds of writes, resumed after each."""
    rng = random.Random(f"{seed}/enospc/{phases[0]}")
    plans = [
        Plan(kind, rng.randint(1, 2), rng.choice(("before", "torn")), rng.choice(("full", "full_once")), within=phase)
        for phase in phases
        for kind in ENOSPC_KINDS[phase]
    ]
    return Chain(f"full-disk-{phases[0]}", "lightning", plans)


def full_stores(root: Path, tell: Callable[[str], None]) -> tuple[int, list[str]]:
    """How many writes were tried with a full disk, and what was corrupt after that."""
    root.mkdir(parents=True)
    done = subprocess.run([sys.executable, str(Path(__file__)), str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the test of the stores ended early: {done.stderr[-3000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    tell("full disk in the stores, writes by operation: " + ", ".join(f"{n} {o}" for o, n in report["points"].items()))
    return sum(report["points"].values()), report["corrupt"]


def try_all(root: Path, points: Failpoints) -> dict[str, Any]:
    """Try each operation with a full disk at each of its writes; counts and problems."""
    tried: dict[str, int] = {}
    corrupt: list[str] = []
    for name, operation in operations().items():
        prepared = root / "prepared"
        shutil.rmtree(prepared, ignore_errors=True)
        prepare(prepared)
        before = seen(prepared)
        for action in ("full_once", "full"):
            for moment in ("before", "torn"):
                for hit in range(1, writes_of(operation, prepared, root / "count", points) + 1):
                    home = Path(shutil.copytree(prepared, root / "tried"))
                    points.plan, points.hits, points.full = Plan(ANY, hit, moment, action), 0, False  # type: ignore[arg-type]
                    failed = raised(operation, home)
                    points.plan, points.full, points.refused = None, False, False
                    where = f"{name}, write {hit}, {action}, {moment}"
                    corrupt += [f"{where}: {problem}" for problem in problems(operation, home, before, failed)]
                    tried[name] = tried.get(name, 0) + 1
                    shutil.rmtree(home)
    return {"points": tried, "corrupt": corrupt}


def writes_of(operation: Callable[[Path], Any], prepared: Path, copy: Path, points: Failpoints) -> int:
    """How many writes the operation makes when there is room."""
    shutil.copytree(prepared, copy)
    points.plan, points.hits = Plan(ANY, 10**9, action="full_once"), 0
    operation(copy)
    points.plan = None
    shutil.rmtree(copy)
    return points.hits


def problems(operation: Callable[[Path], Any], home: Path, before: dict[str, Any], failed: bool) -> list[str]:
    """What is wrong after an operation met a full disk, and after a repetition with room."""
    if not failed:
        return []  # the caller saw no error, so a repetition would be another operation
    found = []
    try:
        after = seen(home)
        found += [f"{name} changed" for name in before if not is_part_of(before[name], after[name])]
        operation(home)
        seen(home)
    except Exception as error:
        found.append(f"{error!r}")
    return found


def is_part_of(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether everything from before is still there, unchanged."""
    return all(after.get(name) == value for name, value in before.items())


def raised(operation: Callable[[Path], Any], home: Path) -> bool:
    """Whether the operation raised an error."""
    import sqlite3

    from opd_mcp.schemas.errors import OpdError

    try:
        operation(home)
    except (OSError, sqlite3.OperationalError, OpdError):
        return True
    return False


def prepare(home: Path) -> None:
    """A workspace with a finished run, an artifact and a plan."""
    from opd_mcp.store.journal import JournalWriter

    store = store_of(home)
    started = store.start_once(record("before"))
    assert started.lock is not None
    started.lock.release()
    with JournalWriter(home / "runs" / "before" / "journal.jsonl", 1) as journal:
        for state in ("running", "succeeded"):
            journal.append("state", {"state": state})
    lost = store.start_once(record("lost"))
    assert lost.lock is not None
    lost.lock.release()
    publish(home, "prompts-before")
    store.list_runs()


def operations() -> dict[str, Callable[[Path], Any]]:
    """The operations that write to a workspace, by name."""
    return {
        "start": start,
        "journal": journal_lines,
        "publish": lambda home: publish(home, "prompts-after"),
        "cancel": cancel,
        "rebuild": lambda home: store_of(home).rebuild(),
        "resume": resume,
    }


def start(home: Path) -> None:
    """Create a run."""
    started = store_of(home).start_once(record("after"))
    if started.lock is not None:
        started.lock.release()


def journal_lines(home: Path) -> None:
    """Begin an attempt and write a few lines; after a failure try the next, as a failing worker does."""
    from opd_mcp.store.journal import JournalWriter, next_attempt, read_journal

    file = home / "runs" / "before" / "journal.jsonl"
    problem: OSError | None = None
    with JournalWriter(file, next_attempt(file)) as journal:
        for state in ("queued", "running", "failed"):
            try:
                journal.append("state", {"state": state})
            except OSError as error:
                problem = error
            except ValueError:  # the state before it could not be written
                pass
    read_journal(file)
    if problem is not None:
        raise problem


def publish(home: Path, artifact_id: str) -> None:
    """Publish an artifact."""
    store = store_of(home)
    building = store.artifacts.new_building_directory("prompts")
    (building / "prompts.jsonl").write_text('{"prompt":"1+1=?"}\n', encoding="utf-8")
    store.artifacts.publish("prompts", building, artifact_id, key=f"key of {artifact_id}")


def cancel(home: Path) -> None:
    """Ask the run to stop."""
    from opd_mcp.store.runs import request_cancel

    request_cancel(home / "runs" / "before")


def resume(home: Path) -> None:
    """Take the lock of a lost run and queue it again."""
    from opd_mcp.store.runs import RunLock

    again = store_of(home).resume("lost")
    assert isinstance(again.lock, RunLock)
    again.lock.release()


def seen(home: Path) -> dict[str, Any]:
    """What readers find in a workspace: runs, artifacts and lists; raises where anything is damaged."""
    from opd_mcp.store.artifacts import artifact_directories, read_artifact
    from opd_mcp.store.journal import read_journal
    from opd_mcp.store.runs import run_ids

    store = store_of(home)
    with store.index.reading() as database:
        assert database.execute("PRAGMA quick_check").fetchone()[0] == "ok", "the index is damaged"
    runs = {name: store.record(name).to_dict() for name in run_ids(store.workspace)}
    journals = {name: read_journal(home / "runs" / name / "journal.jsonl")[:1] for name in runs}
    artifacts = {path.name: read_artifact(path).record.to_dict() for path in artifact_directories(store.workspace)}
    listed = {row.run_id: row.kind for row in store.list_runs().rows}
    return {"runs": runs, "journals": journals, "artifacts": artifacts, "lists": listed}


def store_of(home: Path) -> Any:
    """The store of a workspace."""
    from opd_mcp.store.store import Store
    from opd_mcp.store.workspace import Workspace

    return Store(Workspace(home))


def record(run_id: str) -> Any:
    """A run's record."""
    from opd_mcp.schemas.recipes import Recipe
    from opd_mcp.schemas.runs import RunInputs, RunRecord, RunRequest

    request = RunRequest(kind="sample", recipe=Recipe(), inputs=RunInputs(), phases=[])
    created = "2026-01-01T00:00:00.000Z"
    return RunRecord(
        run_id=run_id, created_at=created, request_hash=run_id, request=request, versions={}, hardware="none"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps(try_all(folder, install(None, folder / "hits.log"))))
