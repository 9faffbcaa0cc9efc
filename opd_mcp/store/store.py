"""The whole memory in one object: workspace, index and artifacts, with starting once, listing and rebuilding."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from opd_mcp.schemas.errors import IntegrityError, RunError, UnknownIdError
from opd_mcp.schemas.executors import Placing
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.runs import ACTIVE_STATES, FINAL_STATES, RunKind, RunList, RunRecord, RunRow, RunState
from opd_mcp.store.artifacts import ARTIFACT_FILE, ArtifactStore, artifact_directories, artifact_row, read_artifact
from opd_mcp.store.claims import RunClaim, note_ending
from opd_mcp.store.index import Index, IndexedRun, indexed_run, insert_artifact, insert_run, page_of
from opd_mcp.store.journal import read_journal
from opd_mcp.store.run_view import RunView, RunViews
from opd_mcp.store.runs import (
    JOURNAL_FILE,
    RECORD_FILE,
    RunLock,
    acquire_run,
    begin_attempt,
    claimed_attempt,
    create_run,
    read_record,
    run_directory,
    run_ids,
    withdraw_cancel,
)
from opd_mcp.store.states import require_resumable, state_of
from opd_mcp.store.worker_process import stopped_worker
from opd_mcp.store.workspace import ARTIFACT_KINDS, Workspace, is_id, is_shared

NEWEST = 16


@dataclass(frozen=True)
class StartedRun:
    """What a start or a resume found: `lock` is set for a new attempt, and then belongs to the caller."""

    run_id: str
    lock: RunLock | RunClaim | None
    attempt: int = 1

    @property
    def reused(self) -> bool:
        """Whether an active run already does this."""
        return self.lock is None


class Store:
    """The memory of one workspace; safe to share between threads and to open in several processes."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.index = Index(workspace.index, workspace.index_note, self._fill)
        self.artifacts = ArtifactStore(workspace, self.index)
        self.views = RunViews(workspace)
        self.index.check()
        self._add_unindexed()

    def start_once(
        self, record: RunRecord, admit: Callable[[], None] = lambda: None, placing: Placing | None = None
    ) -> StartedRun:
        """Create the run and take its lock, or find the active run of the same request.

        Identical starts from several processes at the same moment give one new run; the others are `reused`.
        `admit` is called before a new run, one caller at a time; what it raises refuses the start. `placing` is that
        of a run on an executor's machines.
        """
        lock: RunLock | RunClaim | None = None
        try:
            with self.index.writing() as database:
                active = self._active_run(database, record.request_hash)
                if active is not None:
                    return StartedRun(active, None)
                admit()
                lock = acquire_run(create_run(self.workspace, record), 0, placing)
                begin_attempt(lock)
                insert_run(database, indexed_run(record))
        except BaseException:
            if lock is not None:
                lock.release()
                shutil.rmtree(lock.directory)
            raise
        return StartedRun(record.run_id, lock)

    def resume(
        self, run_id: str, admit: Callable[[], None] = lambda: None, placing: Placing | None = None
    ) -> StartedRun:
        """Begin the next attempt of a failed, cancelled or lost run and take its lock; `reused` while it is active.

        Raises UnknownIdError `unknown_run`, and RunError `run_not_active` for a run that has succeeded,
        `same_request_active` while another run has the same request, `run_locked` when its last attempt does not end.
        """
        seen = claimed_attempt(run_directory(self.workspace, run_id))  # before it is looked at
        view = self.view(run_id)
        if view.state in ACTIVE_STATES:
            return StartedRun(run_id, None)
        require_resumable(view.state, run_id)
        record = self.record(run_id)
        try:
            lock = acquire_run(view.directory, seen, placing)
        except RunError:
            if view.refresh().state in ACTIVE_STATES:  # another process resumed it meanwhile
                return StartedRun(run_id, None)
            raise
        try:
            with self.index.writing() as database:
                # Only from here on no other process can end or resume it.
                require_resumable(state_of(view.refresh().written, alive=False), run_id)
                other = self._active_run(database, record.request_hash, besides=run_id)
                if other is not None:
                    raise RunError(
                        "same_request_active",
                        "Another run of the same request is active.",
                        value=run_id,
                        fix="Follow that run.",
                        call=next_call("get_run_status", run_id=other),
                    )
                admit()
                withdraw_cancel(view.directory)
                attempt = begin_attempt(lock)
                insert_run(database, indexed_run(record))
        except BaseException:
            if isinstance(lock, RunClaim):
                note_ending(view.directory, lock.attempt, "The resume was refused.")
            lock.release()
            raise
        return StartedRun(run_id, lock, attempt)

    def is_active(self, request_hash: str) -> bool:
        """Whether a run of this request is queued or running."""
        with self.index.reading() as database:
            return self._active_run(database, request_hash) is not None

    def view(self, run_id: str, *, keep_series: bool = False) -> RunView:
        """The current state of a run, with full series on request; raises UnknownIdError `unknown_run`."""
        return RunView(run_directory(self.workspace, run_id), keep_series, watch=self.views.watch).refresh()

    def record(self, run_id: str) -> RunRecord:
        """The record of a run; raises UnknownIdError `unknown_run`, IntegrityError `damaged_file`."""
        return read_record(run_directory(self.workspace, run_id))

    def run_named(self, name: str) -> str | None:
        """The id of the run with this name, if any; raises UnknownIdError `unknown_run` where several have it."""
        same = [row.run_id for row in self.index.runs(name=name) if row.name == name and self.exists(row.run_id)]
        if len(same) > 1:
            raise UnknownIdError(
                "unknown_run",
                f"{len(same)} runs have this name.",
                value=name,
                nearest=same[:5],
                fix="Give the id of the one that you mean; the newest comes first.",
            )
        return same[0] if same else None

    def tagged(self, tag: str) -> list[str]:
        """The ids of all runs with a tag, such as a sweep's id, oldest first."""
        return [row.run_id for row in reversed(self.index.runs(tag=tag)) if self.exists(row.run_id)]

    def run_of(self, name: str) -> str:
        """The id of the run that an id or a name means, the text itself where there is none.

        Raises UnknownIdError `unknown_run` where several runs have the name, or the text as a tag.
        """
        known = name if self.exists(name) else self.run_named(name)
        if known is None and (tagged := self.tagged(name)):
            raise UnknownIdError(
                "unknown_run",
                f"This is a tag of {len(tagged)} runs, and one run is needed here.",
                value=name,
                nearest=tagged[:5],
                fix="Give the id of one of them; a comparison and a cancellation take the tag.",
                call=next_call("list_runs", tag=name),
            )
        return known or name

    def latest_run(self) -> str | None:
        """The id of the newest run; None when there is none."""
        newest = chain(self.index.newest_runs(NEWEST), (row.run_id for row in self.index.runs()))
        return next((run_id for run_id in newest if self._exists(run_id)), None)

    def active_runs(self) -> list[str]:
        """The ids of the runs that are queued or running."""
        open_rows = [row.run_id for row in self.index.runs(unfinished=True) if self._exists(row.run_id)]
        return [run_id for run_id in open_rows if self.views.state(run_id) in ACTIVE_STATES]

    def list_runs(
        self,
        *,
        state: RunState | None = None,
        kind: RunKind | None = None,
        name: str | None = None,
        tag: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> RunList:
        """A page of runs, newest first; `total` counts all that match and is the same on every page.

        `name` is a part of the name, in any case; `tag` one of the tags.

        Raises ArgumentError `invalid_argument` for a cursor that no list gave.
        """
        indexed = self.index.runs(kind=kind, name=name, tag=tag)
        here = set(os.listdir(self.workspace.runs))  # after the index: what was indexed then is here now, or gone
        listed = [row for row in indexed if row.run_id in here and (row.final_state or self._exists(row.run_id))]
        matching = [row for row in listed if state is None or state == self._state(row)]
        page, next_cursor = page_of(matching, lambda row: (row.created_at, row.run_id), limit, cursor)
        states = [self._state(row) for row in page]
        rows = [
            RunRow(
                run_id=row.run_id,
                kind=row.kind,
                state=found,
                name=row.name,
                tags=json.loads(row.tags) or None,
                note=self._note(row.run_id) if found in ACTIVE_STATES else self._judgement(row.run_id, found),
                created_at=row.created_at,
                student=row.student,
                teacher=row.teacher,
            )
            for row, found in zip(page, states, strict=True)
        ]
        whole = (cursor, kind, name, tag) == (None,) * 4
        damaged = self._damaged_among(here - {row.run_id for row in indexed}) if whole else []
        return RunList(rows=rows, total=len(matching), next_cursor=next_cursor, damaged=damaged or None)

    def _damaged_among(self, run_ids: Collection[str]) -> list[str]:
        """Those runs that a rebuilt index had to leave out, since their record or journal cannot be read."""
        return sorted(name for name in run_ids if is_id(name) and self._exists(name) and self._is_damaged(name))

    def _is_damaged(self, run_id: str) -> bool:
        directory = self.workspace.run(run_id)
        try:
            read_record(directory)
            read_journal(directory / JOURNAL_FILE)
        except IntegrityError:
            return True
        except FileNotFoundError:  # removed meanwhile
            pass
        return False

    def rebuild(self) -> list[IntegrityError]:
        """Rebuild the index from the directories; returns what could not be read and is left out."""
        return self.index.rebuild()

    def damaged(self) -> Iterator[IntegrityError]:
        """What is wrong with runs and artifacts whose files cannot be read."""
        for directory in sorted(path for path in self.workspace.runs.iterdir() if path.is_dir()):
            try:
                read_record(directory)
                read_journal(directory / JOURNAL_FILE)
            except IntegrityError as problem:
                yield problem
        yield from self.artifacts.damaged()

    def _fill(self, database: sqlite3.Connection) -> list[IntegrityError]:
        """Write the rows of all directories; returns what cannot be read and is left out."""
        directories = [self.workspace.run(run_id) for run_id in run_ids(self.workspace)]
        return self._insert(database, directories, artifact_directories(self.workspace))

    def _insert(self, database: sqlite3.Connection, runs: list[Path], artifacts: list[Path]) -> list[IntegrityError]:
        problems: list[IntegrityError] = []
        for directory in runs:
            try:
                state = RunView(directory).refresh().state
                final_state = state if self._is_settled(state) else None
                insert_run(database, indexed_run(read_record(directory), final_state))
            except IntegrityError as problem:
                problems.append(problem)
        for path in artifacts:
            try:
                insert_artifact(database, artifact_row(read_artifact(path).record))
            except IntegrityError as problem:
                problems.append(problem)
        return problems

    def look_around(self) -> None:
        """Index what other machines made in a workspace that they share; nothing in one that is this machine's."""
        if is_shared(self.workspace):
            self._add_unindexed()

    def _add_unindexed(self) -> None:
        """Add directories that are not indexed: their maker died before it could index them, or has another index."""
        with self.index.reading() as database:
            known = {
                name for (name,) in database.execute("SELECT run_id FROM runs UNION SELECT artifact_id FROM artifacts")
            }
        runs = [path for path in _folders(self.workspace.runs) if path.name not in known and self._exists(path.name)]
        folders = [path for kind in ARTIFACT_KINDS for path in _folders(self.workspace.artifacts_of(kind))]
        artifacts = [path for path in folders if path.name not in known and (path / ARTIFACT_FILE).is_file()]
        if runs or artifacts:
            with self.index.writing() as database:
                self._insert(database, runs, artifacts)

    def forget(self, run_id: str) -> None:
        """Take a run whose directory is gone out of every list."""
        self.index.remove_run(run_id)
        self.views.forget(run_id)

    def exists(self, run_id: str) -> bool:
        """Whether there is such a run."""
        return is_id(run_id) and self._exists(run_id)

    def _exists(self, run_id: str) -> bool:
        return (self.workspace.run(run_id) / RECORD_FILE).is_file()

    def _active_run(self, database: sqlite3.Connection, request_hash: str, besides: str = "") -> str | None:
        rows = database.execute(
            "SELECT run_id FROM runs WHERE request_hash = ? AND run_id <> ? AND final_state IS NULL"
            " ORDER BY created_at",
            (request_hash, besides),
        ).fetchall()
        active = (id for (id,) in rows if self._exists(id) and self.views.state(id) in ACTIVE_STATES)
        return next(active, None)

    def _state(self, row: IndexedRun) -> RunState:
        """A run's state, recorded in the index once the run has ended."""
        if row.final_state is not None:
            return row.final_state
        state = self.views.state(row.run_id)
        if self._is_settled(state):
            self.index.set_final_state(row.run_id, lambda: self.views.state(row.run_id))
        return state

    def _is_settled(self, state: RunState) -> bool:
        """Whether the index may keep the state: no other machine can resume the run without this index."""
        return state == "succeeded" or (state in FINAL_STATES and not is_shared(self.workspace))

    def _note(self, run_id: str) -> str | None:
        """What an active run's row says of its process."""
        directory = self.workspace.run(run_id)
        pid = stopped_worker(directory, self.views.look(run_id, lambda view: view.attempt))
        return None if pid is None else f"worker stopped, pid {pid}"

    def _judgement(self, run_id: str, state: RunState) -> str | None:
        """What a run that has ended well came to, from its journal's result; None where it was not judged."""
        if state != "succeeded":
            return None
        with suppress(UnknownIdError):  # removed meanwhile
            return self.views.judgement(run_id)
        return None


def _folders(parent: Path) -> list[Path]:
    return [parent / name for name in sorted(os.listdir(parent)) if not name.startswith(".")]
