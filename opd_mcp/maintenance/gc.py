"""`opd-mcp gc`: finds what is unused in a workspace, and removes it.

In doubt it keeps files. The needs of a damaged run are unknown, so with one nothing that a run could need is offered.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from opd_mcp.planning.phases import KEY_DIGITS, RESUMABLE
from opd_mcp.schemas.answers import GarbageReport, Leftover
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError
from opd_mcp.schemas.runs import FINAL_STATES, RunRecord, RunState
from opd_mcp.store.artifacts import BUILDING_PREFIX, LOCK_SUFFIX, build_lock, unused_build
from opd_mcp.store.claims import is_placed
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.runs import CHECKPOINTS, RESERVE_FILE, is_alive, run_ids
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import ARTIFACT_KINDS
from opd_mcp.views.artifacts import delete_artifact, dependents, used_by

DAY = 86400.0
# A file that is being written is never unchanged for so long.
IDLE_SECONDS = 3600.0
DELETED = BUILDING_PREFIX + "deleted-"
BUILD_NAME = re.compile(rf"{re.escape(BUILDING_PREFIX)}({'|'.join(sorted(RESUMABLE))})-([0-9a-f]+)")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def collected(store: Store, *, remove: bool, older_than_days: float, artifacts: bool = False) -> GarbageReport:
    """What is unused, removed on request; builds that a new run could resume and old indexes only from that age on.

    A build that an open run would resume is not garbage; a build whose run has succeeded is.
    """
    now = time.time()
    damaged = list(store.damaged())
    kept = [f"{problem.value}: {problem.message}" for problem in damaged]
    items = [
        *_deleted(store),
        *_locks(store),
        *_temporary(store, now),
        *_downloads(store, now),
        *_checkpoints(store),
        *_old_indexes(store, now, older_than_days),
    ]
    if not damaged:
        items += _builds(store, now, older_than_days)
        items += _artifacts(store) if artifacts else []
    if remove:
        items = [item for item in items if _removed(store, item)]
    return GarbageReport(removed=remove, bytes=sum(item.bytes for item in items), items=items, kept=kept)


def open_records(store: Store) -> list[RunRecord]:
    """The records of all runs that are active or can be resumed; raises IntegrityError for a damaged one."""
    return [record for record, state in _all_records(store) if state != "succeeded"]


def _all_records(store: Store) -> list[tuple[RunRecord, RunState]]:
    return [(store.record(run), store.view(run).state) for run in run_ids(store.workspace)]


def _locks(store: Store) -> Iterator[Leftover]:
    """Lock files whose build is gone: their last holder died between the two."""
    for kind in ARTIFACT_KINDS:
        for lock in sorted(store.workspace.artifacts_of(kind).glob(f"{BUILDING_PREFIX}*{LOCK_SUFFIX}")):
            directory = _build_of(lock)
            with unused_build(directory) as unused:
                if unused and not directory.exists():
                    yield _leftover("build", lock)


def _deleted(store: Store) -> Iterator[Leftover]:
    for folder in (store.workspace.root, *map(store.workspace.artifacts_of, ARTIFACT_KINDS)):
        for path in sorted(folder.glob(f"{DELETED}*")):
            yield _leftover("deleted", path)


def _builds(store: Store, now: float, days: float) -> Iterator[Leftover]:
    runs = _all_records(store)
    records = [record for record, state in runs if state != "succeeded"]
    keys = _keys(records)
    finished = _keys(record for record, state in runs if state == "succeeded")
    made = {artifact_id for record in records for artifact_id in used_by(record)}
    for kind in ARTIFACT_KINDS:
        for path in sorted(store.workspace.artifacts_of(kind).glob(f"{BUILDING_PREFIX}*")):
            if not path.is_dir() or path.name.startswith(DELETED):
                continue
            name = BUILD_NAME.fullmatch(path.name)
            needed = name[2] in keys if name else any((path / artifact_id).exists() for artifact_id in made)
            may_be_taken_up = name is not None and name[2] not in finished
            if not needed and now - _touched(path) > (days * DAY if may_be_taken_up else IDLE_SECONDS):
                with unused_build(path) as unused:
                    if unused:
                        yield _leftover("build", path)


def _keys(records: Iterable[RunRecord]) -> set[str]:
    return {phase.key[:KEY_DIGITS] for record in records for phase in record.request.phases}


def _build_of(path: Path) -> Path:
    """The building directory of a lock file; a directory stands for itself."""
    return path.with_name(path.name.removesuffix(LOCK_SUFFIX))


def _downloads(store: Store, now: float) -> Iterator[Leftover]:
    if store.active_runs():
        return  # one of them may be fetching
    for path in sorted(store.workspace.hub.rglob(f"{BUILDING_PREFIX}*")):
        if path.is_dir() and now - _touched(path) > IDLE_SECONDS:
            yield _leftover("build", path)


def _is_live(store: Store, run_id: str) -> bool:
    """Whether a process may write in a run's directory; that of a placed run is known by its state only."""
    directory = store.workspace.run(run_id)
    return is_alive(directory) and not (is_placed(directory) and store.views.state(run_id) in FINAL_STATES)


def _temporary(store: Store, now: float) -> Iterator[Leftover]:
    for folder, directories, files in os.walk(store.workspace.root):
        # Builds are judged as a whole, and files of a live run are never garbage.
        directories[:] = [
            name
            for name in sorted(directories)
            if not name.startswith(BUILDING_PREFIX)
            and not (Path(folder) == store.workspace.runs and _is_live(store, name))
            and Path(folder) / name != store.workspace.hub
        ]
        for name in sorted(files):
            path = Path(folder) / name
            if TEMPORARY.fullmatch(name) and now - _touched(path) > IDLE_SECONDS:
                yield _leftover("temporary", path)


def _checkpoints(store: Store) -> Iterator[Leftover]:
    for run_id in run_ids(store.workspace):
        with suppress(IntegrityError):
            if store.view(run_id).state == "succeeded":
                directory = store.workspace.run(run_id)
                for path in sorted((directory / CHECKPOINTS).glob("*")):
                    yield _leftover("checkpoints", path)
                if (directory / RESERVE_FILE).exists():
                    yield _leftover("temporary", directory / RESERVE_FILE)


def _old_indexes(store: Store, now: float, days: float) -> Iterator[Leftover]:
    index = store.workspace.index
    aside = [*index.parent.glob(f"{index.name}*.damaged-*"), *index.parent.glob(f"{index.name}*.version-*")]
    for path in sorted(aside):
        if now - _touched(path) > days * DAY:
            yield _leftover("index", path)


def _artifacts(store: Store) -> Iterator[Leftover]:
    """Artifacts that are no run's result, that no open run uses and from which nothing descends."""
    needed = {artifact_id for record in open_records(store) for artifact_id in used_by(record)}
    for run_id in run_ids(store.workspace):
        needed |= set(store.view(run_id).artifacts.values())
    for artifact in store.artifacts.list():
        if artifact.artifact_id not in needed and next(dependents(store, artifact), None) is None:
            yield _leftover("artifact", artifact.path)


def _removed(store: Store, item: Leftover) -> bool:
    """Whether it was removed; an item that has come into use since it was found stays."""
    path = Path(item.path)
    if item.kind == "artifact":
        try:
            delete_artifact(store, path.name)
        except (IntegrityError, UnknownIdError):
            return False
    elif item.kind == "build":
        directory = _build_of(path)
        with unused_build(directory) as unused:
            if unused and (path == directory or not directory.exists()):
                _remove(path)
                _remove(build_lock(directory))
    else:
        _remove(path)
    return not path.exists()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _leftover(kind: str, path: Path) -> Leftover:
    size = tree_bytes(path) if path.is_dir() else path.lstat().st_size
    return Leftover.model_validate({"kind": kind, "path": str(path), "bytes": size})


def _touched(path: Path) -> float:
    """When something in or at the path was last written."""
    try:
        return max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:
        return math.inf  # another process is at work there
