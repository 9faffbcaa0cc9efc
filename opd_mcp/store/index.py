"""The SQLite index over runs and artifacts: for listing and for starting once; every row is rebuilt from the files."""

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from opd_mcp.schemas.errors import IntegrityError, ResourceError
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.runs import FINAL_STATES, RunKind, RunRecord, RunState
from opd_mcp.store.files import free_bytes

SCHEMA_VERSION = 2  # 2: artifacts by time
# Larger than this an index is not looked through at every start.
CHECKED_BYTES = 64 << 20
SMALL_BYTES = 1 << 20
LATER_VERSION, EMPTY = "later", "empty"
BUSY_SECONDS = 10.0
SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, kind TEXT NOT NULL, created_at TEXT NOT NULL, request_hash TEXT NOT NULL,
    student TEXT, teacher TEXT, final_state TEXT
) STRICT;
CREATE INDEX runs_by_time ON runs (created_at, run_id);
CREATE INDEX runs_by_request ON runs (request_hash);
CREATE TABLE artifacts (
    artifact_id TEXT PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, run_id TEXT,
    created_at TEXT NOT NULL, bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX artifacts_by_key ON artifacts (kind, key);
CREATE INDEX artifacts_by_time ON artifacts (created_at, artifact_id);
"""


@dataclass(frozen=True)
class IndexedRun:
    """One row of `runs`; `final_state` is None while nobody has seen the run end."""

    run_id: str
    kind: RunKind
    created_at: str
    request_hash: str
    student: str | None
    teacher: str | None
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
        final_state=final_state,
    )


class Index:
    """Opens the database for each call, so it is safe in threads and processes; makes it when there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for queries; raises IntegrityError `damaged_file` when the file is no database."""
        with self._connection() as database:
            yield database

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection inside BEGIN IMMEDIATE: one writer of all processes at a time; rolled back on an exception."""
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.rollback()
                raise
            database.commit()

    def must_be_rebuilt(self) -> bool:
        """Whether the index must be filled from the directories: there is none, an earlier version's, or a damaged one.

        A damaged or earlier one is put aside as `opd.sqlite.damaged-…` or `….version-1-…` first. Raises IntegrityError
        `damaged_file` for one of a later version.
        """
        if not self.path.exists():
            return True
        problem = self._problem()
        if problem == EMPTY:
            with self._turn():  # whoever makes it has its turn now
                problem = self._problem()
        if problem == LATER_VERSION:
            raise self._unusable("it was written by a later version of this program")
        if problem not in (None, EMPTY):
            self._put_aside(problem)
        return problem is not None

    def set_final_state(self, run_id: str, look: Callable[[], RunState]) -> None:
        """Remember how a run ended; `look` is asked inside of the transaction, so a run resumed by then is not shut."""
        with self.writing() as database:
            state = look()
            if state in FINAL_STATES:
                database.execute("UPDATE runs SET final_state = ? WHERE run_id = ?", (state, run_id))

    def runs(self, *, kind: RunKind | None = None) -> list[IndexedRun]:
        """Rows newest first."""
        with self.reading() as database:
            rows = database.execute(
                "SELECT run_id, kind, created_at, request_hash, student, teacher, final_state FROM runs"
                " WHERE kind = coalesce(?, kind) ORDER BY created_at DESC, run_id DESC",
                (kind,),
            ).fetchall()
        return [IndexedRun(*row) for row in rows]

    def add_artifact(self, row: IndexedArtifact) -> None:
        """Insert or replace an artifact's row."""
        with self.writing() as database:
            insert_artifact(database, row)

    def remove_artifact(self, artifact_id: str) -> None:
        """Forget an artifact whose directory is gone."""
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

    def artifacts_of_keys(self, keys: Collection[str]) -> list[IndexedArtifact]:
        """Rows of the artifacts that were made by these keys, oldest first."""
        with self.reading() as database:
            rows = database.execute(
                "SELECT artifact_id, kind, key, run_id, created_at, bytes FROM artifacts"
                " WHERE key IN (SELECT value FROM json_each(?)) ORDER BY created_at, artifact_id",
                (json.dumps(list(keys)),),
            ).fetchall()
        return [IndexedArtifact(*row) for row in rows]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._open()) as database:
                yield database
        except sqlite3.OperationalError as error:
            if not self._disk_is_full(error):
                raise
            raise ResourceError(
                "not_enough_disk",
                f"The disk is full: nothing was written ({error}).",
                value=self.path.parent,
                fix="Free disk space (opd-mcp gc shows what is unused), then make the call again.",
            ) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses tell of a busy or full disk, or of a mistake
                raise
            raise self._unusable(str(error)) from error

    def _problem(self) -> str | None:
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
                version = _version(database)
                if version != SCHEMA_VERSION:
                    known = EMPTY if version == 0 else f"version-{version}"
                    return LATER_VERSION if version > SCHEMA_VERSION else known
                if self.path.stat().st_size > CHECKED_BYTES:
                    return None
                [answer] = database.execute("PRAGMA quick_check(1)").fetchone()
                return None if answer == "ok" else "damaged"
        except sqlite3.OperationalError:
            raise  # busy, or the disk: no sign of damage
        except sqlite3.DatabaseError:
            return "damaged"

    def _put_aside(self, why: str) -> None:
        with self._turn():
            if not self.path.exists() or self._problem() is None:
                return  # another process was faster
            mark = f".{why}-{time.strftime('%Y%m%d-%H%M%S')}"
            for suffix in ("", "-wal", "-shm"):
                file = self.path.with_name(self.path.name + suffix)
                if file.exists():
                    os.rename(file, file.with_name(file.name + mark))

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            if _version(database) != SCHEMA_VERSION:
                self._create(database)
            database.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            database.close()
            raise
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        with self._turn():
            if _version(database) == SCHEMA_VERSION:
                return
            if _version(database) != 0:
                raise self._unusable(f"version {_version(database)}, and this program needs {SCHEMA_VERSION}")
            os.chmod(self.path, 0o600)
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process of all at a time: turning on WAL ignores the busy timeout, and so does renaming."""
        turn = os.open(self.path.with_name(self.path.name + ".create"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield
        finally:
            os.close(turn)

    def _disk_is_full(self, error: sqlite3.OperationalError) -> bool:
        # SQLite tells of a shared-memory file that cannot grow as of any other failure of the disk.
        told = error.sqlite_errorname
        return told == "SQLITE_FULL" or (told.startswith("SQLITE_IOERR") and free_bytes(self.path) < SMALL_BYTES)

    def _unusable(self, why: str) -> IntegrityError:
        return IntegrityError(
            "damaged_file",
            f"The index cannot be used ({why}).",
            value=self.path,
            fix="Run opd-mcp doctor --repair: it is rebuilt from the run directories.",
        )


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def insert_run(database: sqlite3.Connection, row: IndexedRun) -> None:
    """Insert or replace a run's row inside a caller's transaction."""
    database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(row))


def insert_artifact(database: sqlite3.Connection, row: IndexedArtifact) -> None:
    """Insert or replace an artifact's row inside a caller's transaction."""
    database.execute("INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, ?, ?)", astuple(row))
