"""The journal of a run: append-only JSON lines, each with a sequence number, an attempt and a CRC.

Types and their data:
  state     {"state": RunState}
  phase     {"phase": name, "event": "started" | "finished" | "reused", "cost"?: StageCost, "artifact_id"?: id}
            {"phase": name, "event": "resumed", "step": int}: metrics of later steps, written earlier, are superseded
  progress  {"done": int, "total": int, "unit": text}
  metric    {"step": int, "values": {name: number}}
  alert     {"code": text, "message": text}
  result    what `RunStatus.result` shows
  error     the fields of `Failure`
A torn last line (a crash while writing) is ignored. Any other line that does not fit is damage.
An attempt begins with its first line, written by the process that took the run's lock; see `states`.
"""

import hashlib
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from opd_mcp.schemas.errors import IntegrityError, RunError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.redaction import redacted_values
from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import Failure, PhaseName, RunState
from opd_mcp.store.states import require_transition

RecordType = Literal["state", "phase", "progress", "metric", "alert", "result", "error"]
_CRC_TAIL = len(b',"crc":"00000000"}')
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class JournalRecord:
    """One line; `seq` counts from 1 through all attempts."""

    seq: int
    attempt: int
    time: str
    type: RecordType
    data: dict[str, Any]


def utc_now() -> str:
    """The time as the journal writes it: ISO 8601 in UTC with milliseconds."""
    return utc_text(time.time())


def utc_text(seconds: float) -> str:
    """Seconds since the epoch as the journal writes a time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def encode_record(record: JournalRecord) -> bytes:
    """A record as its line, newline included; numbers that are not finite become null."""
    fields = {"seq": record.seq, "attempt": record.attempt, "time": record.time, "type": record.type}
    body = json.dumps({**fields, "data": _finite(record.data)}, separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def decode_record(line: bytes) -> JournalRecord | None:
    """The record of a line without its newline; None when the line is not one that `encode_record` wrote."""
    body = line[:-_CRC_TAIL] + b"}"
    if line[-_CRC_TAIL:] != b',"crc":"%08x"}' % zlib.crc32(body):
        return None
    try:
        record = JournalRecord(**_value_of(body))
        if b"\\ud" in body:  # half a surrogate pair can be read, but not written or shown
            json.dumps(record.data, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = is_count(record.seq) and is_count(record.attempt)
    return record if numbers and is_time(record.time) and fits(str(record.type), record.data) else None


def _value_of(body: bytes) -> Any:
    try:
        return from_json(body, cache_strings="keys")
    except ValueError:  # half a surrogate pair, or nested deeper than this decoder goes
        return json.loads(body.decode())


class JournalReader:
    """Reads a journal as it grows; damaged lines are skipped, and `damage` describes the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: IntegrityError | None = None
        self.attempt = 0
        self.next_seq = 1
        self.offset = 0
        """Bytes up to the end of the last whole record."""
        self.digest = hashlib.sha256()
        """Has taken in these bytes."""
        self.line = 0

    def size(self) -> int:
        """The file's size in bytes; 0 without a file."""
        with suppress(FileNotFoundError):
            return os.stat(self.path).st_size
        return 0

    def resume(self, offset: int, digest: Any, *, line: int, attempt: int, next_seq: int) -> None:
        """Go on behind the first `offset` bytes, as a reader that has read them undamaged."""
        self.offset, self.digest, self.line, self.attempt, self.next_seq = offset, digest, line, attempt, next_seq

    def new_records(self) -> list[JournalRecord]:
        """The records since the last call, in order."""
        return list(self.each_new_record())

    def each_new_record(self) -> Iterator[JournalRecord]:
        """The records since the last call, in order, with one block of the file in memory; read to the end.

        The part after the last whole record is torn: the next call reads it again.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            if size < self.offset:
                self._flag(self.line, "the file became shorter")
                self.offset = size
            file.seek(self.offset)
            position, line_number, bad_line = self.offset, self.line, 0
            passed: list[bytes] = []
            for line in _whole_lines(file):
                position += len(line) + 1
                line_number += 1
                passed += line, b"\n"
                record = decode_record(line)
                if record is None:
                    if os.pread(file.fileno(), len(line) + 1, position - len(line) - 1) != line + b"\n":
                        return  # its beginning was torn and has been cut off meanwhile: the next call reads it again
                    bad_line = bad_line or line_number
                    continue
                if bad_line:
                    self._flag(bad_line, "the line is damaged")
                    bad_line = 0
                elif not self._continues(record):
                    self._flag(line_number, f"record {record.seq} follows record {self.next_seq - 1}")
                self.offset, self.line = position, line_number
                self.digest.update(b"".join(passed))
                passed.clear()
                if record.attempt >= self.attempt:  # an older attempt that woke up late is fenced off
                    self.attempt, self.next_seq = record.attempt, record.seq + 1
                    yield record

    def _continues(self, record: JournalRecord) -> bool:
        # A new attempt may reuse numbers of records that an older one wrote after the new one had begun.
        if record.attempt > self.attempt:
            return record.seq <= self.next_seq
        return record.attempt < self.attempt or record.seq == self.next_seq

    def _flag(self, line: int, why: str) -> None:
        if self.damage is None:
            self.damage = IntegrityError(
                "damaged_journal",
                f"{self.path.name} line {line}: {why}.",
                value=self.path,
                fix="Trust the artifacts of this run, not its history; start the run again if it has not finished.",
            )


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that have an end, without it."""
    rest: list[bytes] = []
    while block := file.read(BLOCK_BYTES):
        first, *others = block.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            rest = [others.pop()]
            yield from others


def read_journal(path: Path) -> list[JournalRecord]:
    """All records of a journal; raises IntegrityError `damaged_journal` naming the line."""
    reader = JournalReader(path)
    records = reader.new_records()
    if reader.damage is not None:
        raise reader.damage
    return records


class JournalWriter:
    """Appends to a journal; only the process that holds the run's lock may have one. Its threads may share it.

    Opening cuts off a torn last line, so that the next line is not read as damage. `holds_lock` says whether this
    writer still has the run's lock; opening and every call check it, and calls check whether a newer attempt has begun.
    """

    def __init__(self, path: Path, attempt: int, holds_lock: Callable[[], bool] = lambda: True) -> None:
        reader = JournalReader(path)
        states = [record for record in reader.each_new_record() if record.type == "state" and record.attempt == attempt]
        self.path = path
        self.attempt = attempt
        self._holds_lock = holds_lock
        self._state: RunState | None = states[-1].data["state"] if states else None
        self._mutex = threading.RLock()
        self.secrets: tuple[str, ...] = ()
        """Values that no record may contain, besides texts that look like secrets."""
        self._next_seq = reader.next_seq
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        # Without the lock, the rest may be a newer attempt's lines, written since the reader looked.
        if os.fstat(self._descriptor).st_size > reader.offset and holds_lock():
            os.ftruncate(self._descriptor, reader.offset)
        self._size = os.fstat(self._descriptor).st_size
        self._newest = max(reader.attempt, attempt)

    def append(self, type: RecordType, data: Mapping[str, Any], *, durable: bool = True) -> JournalRecord:
        """Write one record; when `durable` it is on the disk before this returns.

        Raises RunError `attempt_superseded`, and ValueError for a state that cannot follow this attempt's last one.
        """
        with self._mutex:
            self.check_fence()
            if type == "state" and self._state is not None:
                require_transition(self._state, data["state"])
            record = JournalRecord(
                self._next_seq, self.attempt, utc_now(), type, redacted_values(dict(data), self.secrets)
            )
            self._write(encode_record(record), durable=durable)
            self._next_seq += 1
            if type == "state":
                self._state = data["state"]
            return record

    def _write(self, line: bytes, *, durable: bool) -> None:
        """Write a whole line or, on a full or failing disk, none of it."""
        before = self._size
        try:
            while line:
                written = os.write(self._descriptor, line)
                line, self._size = line[written:], self._size + written
            if durable:
                os.fsync(self._descriptor)
        except OSError:
            if os.fstat(self._descriptor).st_size == self._size:  # else a newer attempt has written behind it
                os.ftruncate(self._descriptor, before)
                self._size = before
            raise

    def sync(self) -> int:
        """The number of the last record, once all up to it are on the disk; raises RunError `attempt_superseded`."""
        with self._mutex:
            self.check_fence()
            os.fsync(self._descriptor)
            return self._next_seq - 1

    def check_fence(self) -> None:
        """Raise RunError `attempt_superseded` unless this attempt may still write: journal, checkpoints, artifacts.

        It costs two looks at file names. Between this check and the write the process may be suspended for hours;
        readers drop that one late line, since it comes after the newer attempt's first one.
        """
        with self._mutex:
            if not self._holds_lock() or self._superseded():
                raise RunError(
                    "attempt_superseded",
                    f"Attempt {self.attempt} of this run has lost the right to write.",
                    value=self.path.parent.name,
                    fix="Follow the run: a newer attempt works on it, or a resume begins one.",
                    call=next_call("get_run_status", run_id=self.path.parent.name),
                )

    def _superseded(self) -> bool:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return True
        if not os.path.samestat(status, os.fstat(self._descriptor)):
            return True
        if status.st_size != self._size:  # another process wrote, which only a newer attempt may do
            self._size = status.st_size
            self._newest = next_attempt(self.path) - 1
        return self._newest > self.attempt

    def close(self) -> None:
        """Close the file; the writer cannot be used afterwards."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def next_attempt(path: Path) -> int:
    """The attempt number for the process that takes a run's lock now: 1, or one more than the journal's last."""
    reader = JournalReader(path)
    for _ in reader.each_new_record():
        pass
    return reader.attempt + 1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


STATES = frozenset(get_args(RunState))
PHASES = frozenset(get_args(PhaseName))
EVENTS = frozenset({"started", "finished", "reused", "resumed"})


def is_time(text: Any) -> bool:
    """Whether a text is a time in the journal's form, its zone included."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_count(value: Any) -> bool:
    """Whether a value is an integer that fits every file format."""
    return type(value) is int and -(1 << 53) < value < 1 << 53


def fits(type: str, data: Any) -> bool:
    """Whether the data has the fields of a record of this type; additional fields are allowed."""
    check = _CHECKS.get(type)
    return check is not None and isinstance(data, dict) and check(data)


def _state(data: dict[str, Any]) -> bool:
    return _text(data.get("state")) and data["state"] in STATES


def _phase(data: dict[str, Any]) -> bool:
    name, event = data.get("phase"), data.get("event")
    named = _text(name) and _text(event) and name in PHASES and event in EVENTS
    placed = event != "resumed" or is_count(data.get("step"))
    numbered = data.get("round") is None or is_count(data["round"])
    return named and placed and numbered and _text(data.get("artifact_id", "")) and _is(StageCost, data.get("cost"))


def _progress(data: dict[str, Any]) -> bool:
    return is_count(data.get("done")) and is_count(data.get("total")) and _text(data.get("unit"))


def _metric(data: dict[str, Any]) -> bool:
    values = data.get("values")
    return is_count(data.get("step")) and isinstance(values, dict) and all(map(_number, values.values()))


def _alert(data: dict[str, Any]) -> bool:
    return _text(data.get("code")) and _text(data.get("message"))


def _number(value: Any) -> bool:
    return value is None or type(value) is float or is_count(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _is(schema: type[BaseModel], value: Any) -> bool:
    try:
        return value is None or bool(schema.model_validate(value))
    except ValidationError:
        return False


_CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "state": _state,
    "phase": _phase,
    "progress": _progress,
    "metric": _metric,
    "alert": _alert,
    "result": lambda data: True,
    "error": lambda data: _is(Failure, data),
}
