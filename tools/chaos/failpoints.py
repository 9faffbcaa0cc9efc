"""Failpoints under the production code: the system calls of this process, named by the file that they touch.

`install(plan)` replaces os.write, os.fsync, os.rename, os.replace, fcntl.flock, SQLite's connections and the two
native writers (Parquet, safetensors). Every call gets a kind (`journal_append`, `shard_write`, `phase_sft`, …); at the
plan's kind and hit the process kills itself, or the disk is full. No production module knows of this.
"""

import errno
import fcntl
import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Action = Literal["kill", "full_once", "full"]
Moment = Literal["before", "torn", "after"]

STARTED = re.compile(rb'"data":\{"phase":"(\w+)","event":"started"')
MODIFYING = ("INSERT", "UPDATE", "DELETE", "COMMIT")
ANY = "any"
RESERVE = "reserve"
FULL = "No space left on device"


@dataclass(frozen=True)
class Plan:
    """What happens to one process: at the `hit`-th call of `kind` (in `within` a phase, when set), `action`.

    `kill` sends SIGKILL, `full_once` fails this call with ENOSPC, `full` this and all later ones until the run gives
    up its reserve.
    """

    kind: str
    hit: int = 1
    moment: Moment = "before"
    action: Action = "kill"
    within: str | None = None

    def save(self, path: Path) -> None:
        """Write the plan where the next process reads it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


class Failpoints:
    """Counts the calls of this process and carries out the plan; hits are appended to `log`."""

    def __init__(self, plan: Plan | None, log: Path) -> None:
        self.plan = plan
        self.log = log
        self.phase = "none"
        self.hits = 0
        self.full = self.refused = False
        self.write, self.kill = os.write, os.kill

    def around(
        self,
        kind: str,
        call: Callable[[], Any],
        torn: Callable[[], Any] = lambda: None,
        *,
        needs_space: bool = True,
    ) -> Any:
        """The result of `call`; at the planned hit, the plan's action before, after or instead of (`torn`) it.

        Raises OSError ENOSPC where the plan fills the disk, and with `full` for each later call that needs space.
        """
        if (self.full or self.refused) and needs_space:
            self.refused = False
            raise no_space()
        if (self.plan and self.plan.action != "kill" and not needs_space) or not self._due(kind):
            return call()
        taken = None
        if self.plan.moment == "after" and self.plan.action == "kill":
            call()
        elif self.plan.moment == "torn":
            taken = torn()
        self.note(f"{kind} {self.plan.moment} {self.phase}")
        if self.plan.action == "kill":
            self.kill(os.getpid(), signal.SIGKILL)
        self.full = self.plan.action == "full"
        if taken is not None:  # a kernel writes what fits and says how much; the next write fails
            self.refused = True
            return taken
        raise no_space()

    def _due(self, kind: str) -> bool:
        if self.plan is None or self.plan.kind not in {kind, ANY} or self.plan.within not in {None, self.phase}:
            return False
        self.hits += 1
        return self.hits == self.plan.hit

    def note(self, text: str) -> None:
        """Append a line to the log, bypassing all failpoints."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.write(descriptor, f"{os.getpid()} {text}\n".encode())
        os.close(descriptor)


def no_space() -> OSError:
    """What a write to a full disk raises."""
    return OSError(errno.ENOSPC, FULL)


def install(plan: Plan | None, log: Path) -> Failpoints:
    """Put the failpoints under this process; call it before anything of the project is imported."""
    points = Failpoints(plan, log)
    _patch_writes(points)
    _patch_renames(points)
    _patch_removals(points)
    _patch_locks(points)
    _patch_database(points)
    return points


WRITES = (
    (re.compile(r"/journal\.jsonl$"), "journal_append"),
    (re.compile(r"/runs/[^/]+/checkpoints/"), "checkpoint_write"),
    (re.compile(r"\.parquet[^/]*$"), "shard_write"),
    (re.compile(r"\.safetensors$"), "weights_write"),
    (re.compile(r"/\.run\.json\.[^/]*$"), "record_write"),
    (re.compile(r"/\.building-"), "artifact_write"),
)


def kind_of_write(path: str) -> str:
    """The kind of a write or fsync on the file or folder at this path."""
    return next((kind for pattern, kind in WRITES if pattern.search(path)), "file_write")


def kind_of_rename(source: str, target: str) -> str:
    """The kind of a rename, by what gets its name."""
    parts = Path(target).parts
    if "checkpoints" in parts and Path(target).name.startswith("step-"):
        return "checkpoint_rename"
    if target.endswith(".parquet"):
        return "shard_rename"
    if len(parts) > 2 and parts[-3] == "artifacts" and ".building-" in source:
        return "artifact_publish"
    return "file_rename"


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _patch_writes(points: Failpoints) -> None:
    write, fsync, sendfile = os.write, os.fsync, os.sendfile

    def failing_write(descriptor: int, data: Any) -> int:
        path = _path_of(descriptor)
        if not path.startswith("/") or path.startswith("/dev/") or path.endswith(".log"):
            return write(descriptor, data)
        kind, half = kind_of_write(path), bytes(data)[: max(1, len(data) // 2)]
        started = STARTED.search(bytes(data)) if kind == "journal_append" else None
        if started:
            points.phase = started[1].decode()
        written: int = points.around(kind, lambda: write(descriptor, data), lambda: write(descriptor, half))
        if started and written == len(data):  # a kernel raises nothing once it has written a part
            points.around(f"phase_{points.phase}", lambda: None)
        return written

    def failing_fsync(descriptor: int) -> None:
        path = _path_of(descriptor)
        kind = kind_of_write(path)
        if kind == "journal_append":  # its write has been counted
            return fsync(descriptor)
        points.around(kind, lambda: fsync(descriptor), lambda: _cut(path))
        return None

    def failing_sendfile(out: int, *rest: Any, **named: Any) -> int:
        sent: int = points.around(kind_of_write(_path_of(out)), lambda: sendfile(out, *rest, **named))
        return sent

    os.write, os.fsync, os.sendfile = failing_write, failing_fsync, failing_sendfile  # type: ignore[assignment]


def _patch_renames(points: Failpoints) -> None:
    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def rename(source: Any, target: Any, **named: Any) -> None:
            kind = kind_of_rename(os.fspath(source), os.fspath(target))
            # A full disk still has room for another name.
            points.around(kind, lambda: real(source, target, **named), needs_space=False)

        return rename

    os.rename, os.replace = failing(os.rename), failing(os.replace)


def _patch_removals(points: Failpoints) -> None:
    unlink = os.unlink

    def freeing_unlink(path: Any, **named: Any) -> None:
        unlink(path, **named)
        if os.path.basename(path) == RESERVE:  # removing a run's disk reserve makes room again
            points.full = False

    os.unlink = freeing_unlink


def _patch_locks(points: Failpoints) -> None:
    flock = fcntl.flock

    def failing_flock(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and re.search(r"/(cpu|gpu)-[^/]*\.lock$", _path_of(descriptor)):
            points.around("lease_handover", lambda: flock(descriptor, how), needs_space=False)
        else:
            flock(descriptor, how)

    fcntl.flock = failing_flock


def _patch_database(points: Failpoints) -> None:
    class FailingConnection(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            def run() -> sqlite3.Cursor:
                return sqlite3.Connection.execute(self, sql, *rest)

            if not sql.lstrip().upper().startswith(MODIFYING):
                return run()
            with _full_database():
                cursor: sqlite3.Cursor = points.around("index_update", run)
            return cursor

        def commit(self) -> None:
            with _full_database():
                points.around("index_update", lambda: sqlite3.Connection.commit(self))

    connect = sqlite3.connect

    def failing_connect(*given: Any, **named: Any) -> sqlite3.Connection:
        return connect(*given, **{"factory": FailingConnection, **named})

    sqlite3.connect = failing_connect  # type: ignore[assignment]


@contextmanager
def _full_database() -> Iterator[None]:
    """ENOSPC as SQLite raises it."""
    try:
        yield
    except OSError as error:
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorcode, full.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
        raise full from error


def patch_native_writers(points: Failpoints) -> None:
    """Put failpoints under the Parquet and safetensors writers, whose system calls bypass Python."""
    import pyarrow.parquet as pq
    import safetensors.torch as st
    from safetensors import SafetensorError

    write_table, serialize_file = pq.write_table, st.serialize_file

    def failing_table(table: Any, where: Any, **named: Any) -> Any:
        def write() -> Any:
            return write_table(table, where, **named)

        return points.around("parquet_write", write, lambda: _half(where, write))

    def failing_weights(tensors: Any, filename: Any, **named: Any) -> Any:
        def write() -> Any:
            return serialize_file(tensors, filename, **named)

        try:
            return points.around(kind_of_write(os.fspath(filename)), write, lambda: _half(filename, write))
        except OSError as error:  # as its Rust code reports it
            raise SafetensorError(f"I/O error: {FULL} (os error {error.errno})") from error

    pq.write_table, st.serialize_file = failing_table, failing_weights


def _half(path: Any, write: Callable[[], Any]) -> None:
    write()
    _cut(os.fspath(path))


def _cut(path: str) -> None:
    """Leave the first half of a file, as a crash in the middle of its writing would."""
    if os.path.isfile(path):
        os.truncate(path, os.path.getsize(path) // 2)
