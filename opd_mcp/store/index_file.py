"""The file behind the index: opened for each call, trusted only while it matches its note, else rebuilt.

The index has a generation and counts its transactions; a note next to it has both, and the file's inode, and is
written after each transaction. An index in another file, of another generation, or one that is behind the note (an
older copy, another workspace's, a new one, one that lost its last transactions with the machine's power) is filled
from the directories before any answer. The generation alone would not do: where only the main file is swapped, SQLite
reads it together with the log of the one before, which still says the right one.
"""

import fcntl
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from opd_mcp.identity.files import fsync_directory
from opd_mcp.schemas.errors import IntegrityError, ResourceError
from opd_mcp.store.files import free_bytes, workspace_missing

SCHEMA_VERSION = 5  # 2: artifacts by time; 3: generation and transactions; 4: artifacts by kind; 5: names and tags
SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, kind TEXT NOT NULL, created_at TEXT NOT NULL, request_hash TEXT NOT NULL,
    student TEXT, teacher TEXT, name TEXT, tags TEXT NOT NULL, final_state TEXT
) STRICT;
CREATE INDEX runs_by_time ON runs (created_at, run_id);
CREATE INDEX runs_by_request ON runs (request_hash);
CREATE TABLE artifacts (
    artifact_id TEXT PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, run_id TEXT,
    created_at TEXT NOT NULL, bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX artifacts_by_key ON artifacts (kind, key);
CREATE INDEX artifacts_by_time ON artifacts (created_at, artifact_id);
CREATE INDEX artifacts_by_kind ON artifacts (kind, created_at, artifact_id);
CREATE INDEX runs_unfinished ON runs (created_at, run_id) WHERE final_state IS NULL;
CREATE TABLE kept (generation TEXT NOT NULL, transactions INTEGER NOT NULL) STRICT;
"""
# A larger index is not checked at every start.
CHECKED_BYTES = 64 << 20
SMALL_BYTES = 1 << 20
BUSY_SECONDS = 10.0
POLL_SECONDS = 0.003
BUILDING = ".building"
COMPANIONS = ("", "-wal", "-shm")
Fill = Callable[[sqlite3.Connection], list[IntegrityError]]
MAGIC = b"SQLite format 3\0"
APPLICATION_ID_OFFSET = 68
"""Where SQLite's header has the number that any program may use; the generation's digits are in it."""


class Kept(NamedTuple):
    """What index and note must agree on."""

    generation: str
    transactions: int


class Note(NamedTuple):
    """The note's content."""

    kept: Kept
    inode: int

    def describes(self, kept: Kept, inode: int, mark: int | None) -> bool:
        """Whether the index with these contents, in this file with this number in its header, is the true one."""
        same = (kept.generation, inode, mark) == (self.kept.generation, self.inode, _mark(self.kept.generation))
        return same and kept.transactions >= self.kept.transactions


class UntrueIndex(Exception):
    """The file cannot be trusted; `mark` is set when it is worth keeping under another name."""

    def __init__(self, mark: str | None = None) -> None:
        super().__init__(mark)
        self.mark = mark


class _OpenFile:
    """The main file's begin, read through one descriptor that stays open while the file is the index.

    To close any descriptor of a file drops the locks that SQLite holds on it in this process, for all threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.Lock()
        self._inode = 0
        self._close: Callable[[], object] | None = None
        self._descriptor = -1

    def begin(self) -> bytes:
        """The begin of the header, as no log changes it; empty without a file."""
        with self._turn:
            try:
                if self._close is None or os.stat(self.path).st_ino != self._inode:
                    self._open()
            except FileNotFoundError:
                return b""
            return os.pread(self._descriptor, APPLICATION_ID_OFFSET + 4, 0)

    def _open(self) -> None:
        descriptor, before = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), self._close
        self._inode, self._descriptor = os.fstat(descriptor).st_ino, descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        if before is not None:
            before()  # of a file that is no index any more


class IndexFile:
    """One workspace's index, safe in threads and processes; `fill` writes the rows of all directories."""

    def __init__(self, path: Path, note: Path, fill: Fill, busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = path
        self._note = note
        self._fill = fill
        self._busy_seconds = busy_seconds
        self._in_turn = threading.RLock()
        self._note_descriptor: int | None = None
        self._header_of = _OpenFile(path)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for queries.

        Raises IntegrityError `damaged_file`, ResourceError `not_enough_disk` or `workspace_busy`, and PathError
        `workspace_missing`.
        """
        with self._translated_errors(), closing(self._opened()) as database:
            yield database

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection inside BEGIN IMMEDIATE: one writer at a time across processes; rolled back on an exception.

        The turn is a separate lock, so that it also holds between processes that see different index files. Raises
        as `reading` does.
        """
        with self._translated_errors(), self._turn(), closing(self._opened()) as database:
            noted = self._read_note()  # nobody else writes it during this turn
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("UPDATE kept SET transactions = transactions + 1")
                kept = _kept(database)
            except BaseException:
                database.rollback()
                raise
            database.commit()
            # A note that was deleted meanwhile described nothing: then the next reader builds the index anew.
            self._write_note(kept, noted.inode if noted else 0)

    def check(self) -> None:
        """Check the whole file; a damaged one or one of an earlier version is renamed, and a new one is built.

        The old one is then called `opd.sqlite.damaged-…` or `….version-1-…`. Raises IntegrityError `damaged_file` for
        one of a later version.
        """
        with self._translated_errors():
            with closing(self._opened()) as database:
                [pages, page_bytes] = (
                    database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
                )
                if pages * page_bytes > CHECKED_BYTES:
                    return
                try:
                    [answer] = database.execute("PRAGMA quick_check(1)").fetchone()
                except sqlite3.OperationalError:
                    raise  # busy, or a failing disk: no sign of damage
                except sqlite3.DatabaseError:
                    answer = "damaged"
            if answer != "ok":
                with self._turn():
                    self._build("damaged")

    def rebuild(self) -> list[IntegrityError]:
        """Fill a new index from the directories; returns what could not be read and is left out."""
        with self._translated_errors(), self._turn():
            return self._build(None)

    def _opened(self) -> sqlite3.Connection:
        """A connection to a trusted index, built if there is none."""
        with suppress(UntrueIndex):
            return self._believed()
        deadline: float | None = None
        with self._turn():
            while True:
                try:
                    return self._believed()  # another process was faster, or this one has built it
                except UntrueIndex as untrue:
                    if deadline is not None and time.monotonic() > deadline:
                        raise self._busy() from untrue  # another process deletes it as fast as it is built
                    self._build(untrue.mark)
                # However long the first build took, e.g. of long journals that nobody has folded.
                deadline = deadline or time.monotonic() + self._busy_seconds

    def _believed(self) -> sqlite3.Connection:
        """A connection to the file as it is; raises UntrueIndex."""
        # In this order: a transaction that comes in between makes the index newer than the note, never older.
        noted, before = self._read_note(), self._status()
        if before is None:
            raise UntrueIndex
        self._require_noted(noted, before[1])
        try:
            # Never created here: an index appears under its name only once it is filled.
            database = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, timeout=self._busy_seconds, isolation_level=None
            )
        except sqlite3.OperationalError:
            if self._status() != before:
                raise UntrueIndex from None
            raise
        try:
            database.execute("PRAGMA synchronous = NORMAL")
            version = int(database.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA_VERSION:
                raise self._unusable(f"version {version} was written by a later version of this program")
            if version != SCHEMA_VERSION:
                raise UntrueIndex(f"version-{version}" if version else "damaged")
            if noted is None:
                raise UntrueIndex
            kept, mark = _kept(database), _mark_of(self._header_of.begin())
            # SQLite opens the log by its name at the first query: it must be that of the same file.
            if self._status() != before or not noted.describes(kept, before[1], mark):
                raise UntrueIndex
        except sqlite3.OperationalError as error:
            database.close()
            if self._status() != before:  # gone meanwhile, which SQLite reports in several ways
                raise UntrueIndex from error
            if error.sqlite_errorname == "SQLITE_ERROR":  # no such table
                raise UntrueIndex("damaged") from error
            raise
        except sqlite3.DatabaseError as error:
            database.close()
            raise UntrueIndex("damaged") from error
        except BaseException:
            database.close()
            raise
        return database

    def _build(self, mark: str | None) -> list[IntegrityError]:
        """Fill a file under a temporary name and replace the current one, which is kept if it has a mark."""
        building = self.path.with_name(self.path.name + BUILDING)
        self._remove(building)
        os.close(os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        kept = Kept(secrets.token_hex(8), 0)
        with closing(sqlite3.connect(building, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(SCHEMA)
            database.execute("BEGIN")
            database.execute("INSERT INTO kept VALUES (?, ?)", kept)
            problems = self._fill(database)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            database.execute(f"PRAGMA application_id = {_mark(kept.generation)}")
            database.commit()
        # The old file goes first: a process that opened it in between would keep its log under the new one's name.
        if mark is None:
            self._remove(self.path)
        else:
            suffix = f".{mark}-{time.strftime('%Y%m%d-%H%M%S')}"
            for part in COMPANIONS:
                with suppress(FileNotFoundError):
                    os.rename(_companion(self.path, part), f"{_companion(self.path, part)}{suffix}")
        inode = os.stat(building).st_ino
        os.replace(building, self.path)
        fsync_directory(self.path.parent)
        self._write_note(kept, inode)
        return problems

    @staticmethod
    def _remove(path: Path) -> None:
        for part in COMPANIONS:
            _companion(path, part).unlink(missing_ok=True)

    def _status(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _require_noted(self, noted: Note | None, inode: int) -> None:
        """Raise UntrueIndex for another file than the note's, before SQLite opens it with the log that is there.

        On closing it, SQLite would write that log into the wrong file and take it from those who use the right one.
        An index without a note, of an earlier version, is looked at by its version first.
        """
        header = self._header_of.begin()
        if noted is not None and (inode, _mark_of(header)) != (noted.inode, _mark(noted.kept.generation)):
            raise UntrueIndex("damaged" if header and not header.startswith(MAGIC) else None)

    def _read_note(self) -> Note | None:
        try:
            generation, transactions, inode = self._note.read_text(encoding="utf-8").split()
            return Note(Kept(generation, int(transactions)), int(inode))
        except (FileNotFoundError, ValueError):
            return None

    def _write_note(self, kept: Kept, inode: int) -> None:
        """For the holder of the turn; of fixed length, so that a reader sees the old note or the new one."""
        assert self._note_descriptor is not None
        text = f"{kept.generation:16} {kept.transactions:020d} {inode:020d}\n"
        os.pwrite(self._note_descriptor, text.encode(), 0)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One writer at a time across threads and processes; a thread may enter its own turn again."""
        deadline = time.monotonic() + self._busy_seconds
        if not self._in_turn.acquire(timeout=self._busy_seconds):
            raise self._busy()
        try:
            if self._note_descriptor is not None:
                yield
                return
            self._note_descriptor = self._locked_note(deadline)
            try:
                yield
            finally:
                os.close(self._note_descriptor)
                self._note_descriptor = None
        finally:
            self._in_turn.release()

    def _locked_note(self, deadline: float) -> int:
        while True:
            descriptor = os.open(self._note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._note)):
                    return descriptor
            except (BlockingIOError, FileNotFoundError):
                pass  # another process has it, or the file was removed in between
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise self._busy()
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._told(error) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses mean a mistake of ours
                raise
            raise self._unusable(str(error)) from error
        except FileNotFoundError as error:
            if self.path.parent.is_dir():
                raise
            raise workspace_missing(self.path.parent) from error

    def _told(self, error: sqlite3.OperationalError) -> Exception:
        name = error.sqlite_errorname if hasattr(error, "sqlite_errorname") else ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return self._busy()
        # SQLite reports a shared-memory file that cannot grow like any other failure of the disk.
        if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and free_bytes(self.path) < SMALL_BYTES):
            return ResourceError(
                "not_enough_disk",
                f"The disk is full: nothing was written ({error}).",
                value=self.path.parent,
                fix="Free disk space (opd-mcp gc shows what is unused), then make the call again.",
            )
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            return ResourceError(
                "workspace_unusable",
                f"The index cannot be opened or written ({error}).",
                value=self.path.parent,
                fix="Check that the workspace's folder and opd.sqlite may be written, and the limit of open files.",
            )
        return error

    def _busy(self) -> ResourceError:
        return ResourceError(
            "workspace_busy",
            f"Another process has held the workspace's index for {self._busy_seconds:g} s.",
            value=self.path.parent,
            fix="Make the call again; if it stays so, look for a stopped opd-mcp process or another program that has "
            "opened opd.sqlite, and end it.",
        )

    def _unusable(self, why: str) -> IntegrityError:
        return IntegrityError(
            "damaged_file",
            f"The index cannot be used ({why}).",
            value=self.path,
            fix="Run opd-mcp doctor --repair: it is rebuilt from the run directories.",
        )


def _kept(database: sqlite3.Connection) -> Kept:
    row = database.execute("SELECT generation, transactions FROM kept").fetchone()
    return Kept(str(row[0]), int(row[1])) if row else Kept("", -1)


def _mark(generation: str) -> int:
    """A number of 28 bits from the generation's digits."""
    return int(generation[:7], 16)


def _companion(path: Path, part: str) -> Path:
    return path.with_name(path.name + part)


def _mark_of(header: bytes) -> int | None:
    """The number in a header; None for one that is cut off."""
    return int.from_bytes(header[APPLICATION_ID_OFFSET:]) if len(header) == APPLICATION_ID_OFFSET + 4 else None
