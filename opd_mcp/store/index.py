"""The SQLite index over runs and artifacts: for listing and for starting once; every row is rebuilt from the files."""

import json
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import TypeVar

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.runs import FINAL_STATES, RunKind, RunRecord, RunState
from opd_mcp.store.index_file import IndexFile
from opd_mcp.store.workspace import is_id


@dataclass(frozen=True)
class IndexedRun:
    """One row of `runs`; `final_state` is None until a process has seen the run end."""

    run_id: str
    kind: RunKind
    created_at: str
    request_hash: str
    student: str | None
    teacher: str | None
    name: str | None = None
    tags: str = "[]"
    """JSON: a list of texts."""
    final_state: RunState | None = None


@dataclass(frozen=True)
class IndexedArtifact:
    """One row of `artifacts`."""

    artifact_id: str
    kind: ArtifactKind
    key: str
    run_id: str | None
    created_at: str
    bytes: int


def indexed_run(record: RunRecord, final_state: RunState | None = None) -> IndexedRun:
    """The row of a run's record."""
    inputs = record.request.inputs
    student = inputs.student or inputs.model
    return IndexedRun(
        run_id=record.run_id,
        kind=record.request.kind,
        created_at=record.created_at,
        request_hash=record.request_hash,
        student=student.reference if student else None,
        teacher=inputs.teacher.reference if inputs.teacher else None,
        name=record.request.labels.name,
        tags=json.dumps(record.request.labels.tags),
        final_state=final_state,
    )


class Index(IndexFile):
    """The index file with its rows of runs and artifacts."""

    def set_final_state(self, run_id: str, look: Callable[[], RunState]) -> None:
        """Record how a run ended; `look` is called inside the transaction, so a run resumed meanwhile stays open."""
        with self.writing() as database:
            state = look()
            if state in FINAL_STATES:
                database.execute("UPDATE runs SET final_state = ? WHERE run_id = ?", (state, run_id))

    def runs(
        self,
        *,
        kind: RunKind | None = None,
        name: str | None = None,
        tag: str | None = None,
        unfinished: bool = False,
    ) -> list[IndexedRun]:
        """Rows newest first, of runs whose name has a part `name`; `unfinished`: without those that were seen end."""
        conditions = ["kind = coalesce(?, kind)"]
        values: list[str | None] = [kind]
        if unfinished:
            conditions.append("final_state IS NULL")
        if name is not None:
            conditions.append("instr(lower(name), lower(?)) > 0")
            values.append(name)
        if tag is not None:
            conditions.append("EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)")
            values.append(tag)
        with self.reading() as database:
            rows = database.execute(
                "SELECT run_id, kind, created_at, request_hash, student, teacher, name, tags, final_state FROM runs"
                f" WHERE {' AND '.join(conditions)} ORDER BY created_at DESC, run_id DESC",
                values,
            ).fetchall()
        return [IndexedRun(*row) for row in rows]

    def newest_runs(self, limit: int) -> list[str]:
        """The ids of the newest runs."""
        with self.reading() as database:
            rows = database.execute("SELECT run_id FROM runs ORDER BY created_at DESC, run_id DESC LIMIT ?", (limit,))
            return [run_id for (run_id,) in rows]

    def remove_run(self, run_id: str) -> None:
        """Remove the row of a run whose directory is gone."""
        with self.writing() as database:
            database.execute("DELETE FROM runs WHERE run_id = ?", (run_id,))

    def add_artifact(self, row: IndexedArtifact) -> None:
        """Insert or replace an artifact's row."""
        with self.writing() as database:
            insert_artifact(database, row)

    def remove_artifact(self, artifact_id: str) -> None:
        """Remove the row of an artifact whose directory is gone."""
        with self.writing() as database:
            database.execute("DELETE FROM artifacts WHERE artifact_id = ?", (artifact_id,))

    def artifacts(self, *, kind: ArtifactKind | None = None, key: str | None = None) -> list[IndexedArtifact]:
        """Rows oldest first."""
        with self.reading() as database:
            rows = database.execute(
                "SELECT artifact_id, kind, key, run_id, created_at, bytes FROM artifacts"
                " WHERE kind = coalesce(?, kind) AND key = coalesce(?, key) ORDER BY created_at, artifact_id",
                (kind, key),
            ).fetchall()
        return [IndexedArtifact(*row) for row in rows]

    def artifact_ids(self, kind: ArtifactKind | None) -> set[str]:
        """The ids of all rows of a kind, or of every kind."""
        condition = "" if kind is None else "WHERE kind = ?"
        with self.reading() as database:
            rows = database.execute(f"SELECT artifact_id FROM artifacts {condition}", (kind,) if kind else ())
            return {artifact_id for (artifact_id,) in rows}

    def artifacts_before(self, cursor: str | None, kind: ArtifactKind | None, limit: int) -> list[IndexedArtifact]:
        """At most `limit` rows newest first, those after the cursor of the page before.

        Raises ArgumentError `invalid_argument` for a cursor that no page gave.
        """
        conditions: list[str] = ["true"]
        values: list[str] = []
        if kind is not None:
            conditions, values = [*conditions, "kind = ?"], [*values, kind]
        if cursor is not None:
            conditions, values = [*conditions, "(created_at, artifact_id) < (?, ?)"], [*values, *place_of(cursor)]
        with self.reading() as database:
            rows = database.execute(
                "SELECT artifact_id, kind, key, run_id, created_at, bytes FROM artifacts"
                f" WHERE {' AND '.join(conditions)} ORDER BY created_at DESC, artifact_id DESC LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [IndexedArtifact(*row) for row in rows]

    def artifacts_of_keys(self, keys: Collection[str]) -> list[IndexedArtifact]:
        """Rows of the artifacts with these keys, oldest first."""
        with self.reading() as database:
            rows = database.execute(
                "SELECT artifact_id, kind, key, run_id, created_at, bytes FROM artifacts"
                " WHERE key IN (SELECT value FROM json_each(?)) ORDER BY created_at, artifact_id",
                (json.dumps(list(keys)),),
            ).fetchall()
        return [IndexedArtifact(*row) for row in rows]


def insert_run(database: sqlite3.Connection, row: IndexedRun) -> None:
    """Insert or replace a run's row inside a caller's transaction."""
    database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(row))


def insert_artifact(database: sqlite3.Connection, row: IndexedArtifact) -> None:
    """Insert or replace an artifact's row inside a caller's transaction."""
    database.execute("INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, ?, ?)", astuple(row))


Row = TypeVar("Row")
Place = tuple[str, str]
"""A row's position in its list: time of creation and id."""


def page_of(
    rows: Sequence[Row], place: Callable[[Row], Place], limit: int, cursor: str | None
) -> tuple[list[Row], str | None]:
    """At most `limit` rows after the cursor, and the cursor of the next page if there is one.

    Raises ArgumentError `invalid_argument` for a cursor that no page gave.
    """
    last_seen = None if cursor is None else place_of(cursor)
    rest = [row for row in rows if last_seen is None or place(row) < last_seen]
    page = rest[:limit]
    return page, "/".join(place(page[-1])) if page and limit < len(rest) else None


def place_of(cursor: str) -> Place:
    """The place that a cursor names; raises ArgumentError `invalid_argument` for one that no page gave."""
    created_at, _, row_id = cursor.partition("/")
    if _is_time(created_at) and is_id(row_id):
        return created_at, row_id
    raise ArgumentError(
        "invalid_argument",
        "This is not a cursor that a page of this list gave.",
        value=cursor,
        fix="Give next_cursor of the page before, or leave out cursor to begin with the newest.",
    )


def _is_time(text: str) -> bool:
    """Whether a text is a time as records write it, e.g. `2026-08-01T10:00:00.000Z`."""
    try:
        return "T" in text and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
