"""The audit log: `audit.jsonl` in the workspace, one line before and one after each call that changes something.

Such calls start, stop, resume, delete or export. The first line is on the disk before the call begins, so what
happened has one even if the process died in between; the call's outcome is then unknown. Lines are only ever appended;
a full file becomes `audit.1.jsonl`, the one before it `audit.2.jsonl`, and so on to the last, which is dropped.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from opd_mcp.schemas.base import Schema, content_hash
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.redaction import redacted
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import Workspace

logger = logging.getLogger(__name__)
AUDIT_FILE = "audit.jsonl"
MAX_FILE_BYTES = 4 << 20
OLDER_FILES = 4
COMMAND_LINE = "opd-mcp command line"
MAX_CLIENT_CHARACTERS = 120
AnswerT = TypeVar("AnswerT", bound=Schema)


class AuditLine(Schema):
    """A line of the file. `outcome` is absent in a call's first line."""

    call: str = Field(pattern=r"^[0-9a-f]{16}$")
    time: str
    client: str
    tool: str
    arguments_sha256: str
    pid: int
    outcome: str | None = Field(None, description="ok, or the code of the error")
    subject: str | None = Field(None, description="the run or artifact that the call is about")


class AuditEntry(Schema):
    """A call as `opd-mcp audit` shows it."""

    time: str
    client: str
    tool: str
    arguments_sha256: str
    outcome: str = Field(description="ok, the code of an error, or unknown: the process ended during the call")
    subject: str | None = None


class AuditPage(Schema):
    """The last calls, oldest first."""

    entries: list[AuditEntry]
    unreadable: int = Field(description="lines that cannot be read, such as one that a crash cut off")


@dataclass(frozen=True)
class AuditLog:
    """The audit log of a workspace; any number of processes may write it."""

    workspace: Workspace
    secrets: tuple[str, ...] = ()
    max_bytes: int = MAX_FILE_BYTES

    @property
    def file(self) -> Path:
        """The file that is written to."""
        return self.workspace.root / AUDIT_FILE

    def recorded(self, client: str, tool: str, arguments: Any, call: Callable[[], AnswerT]) -> AnswerT:
        """The call's answer, with a line before and one after it; raises what the call raises.

        Raises OSError, and does not begin the call, if the first line cannot be written.
        """
        line = AuditLine(
            call=secrets.token_hex(8),
            time=utc_now(),
            client=redacted(client, self.secrets)[:MAX_CLIENT_CHARACTERS],
            tool=tool,
            arguments_sha256=content_hash(arguments),
            pid=os.getpid(),
            subject=subject_of(arguments),
        )
        self._append(line)
        try:
            answer = call()
        except BaseException as error:
            self._append_end(line, error.code if isinstance(error, OpdError) else type(error).__name__, None)
            raise
        self._append_end(line, "ok", subject_of(answer.to_dict()))
        return answer

    def page(self, limit: int) -> AuditPage:
        """The last calls that the files hold."""
        calls: dict[str, AuditEntry] = {}
        unreadable = 0
        for file in (*(self._older(number) for number in range(OLDER_FILES, 0, -1)), self.file):
            try:
                content = file.read_bytes()
            except FileNotFoundError:
                continue
            for text in filter(None, content.split(b"\n")):
                try:
                    line = AuditLine.from_json(text)
                except ValidationError:
                    unreadable += 1
                    continue
                begun = calls.get(line.call)
                values = line.to_dict() | {"time": begun.time if begun else line.time}
                values["outcome"] = line.outcome or (begun.outcome if begun else "unknown")
                calls[line.call] = AuditEntry(**{name: values.get(name) for name in AuditEntry.model_fields})
        return AuditPage(entries=list(calls.values())[-limit:], unreadable=unreadable)

    def _append_end(self, line: AuditLine, outcome: str, subject: str | None) -> None:
        changed = {"outcome": outcome, "subject": subject or line.subject, "time": utc_now()}
        try:
            self._append(line.model_copy(update=changed))
        except OSError:  # what the call did is done, and its answer must not get lost
            logger.exception("The audit log could not be written")

    def _append(self, line: AuditLine) -> None:
        text = line.to_json().encode("utf-8", "backslashreplace") + b"\n"
        with self._locked():
            if self.file.is_file() and self.file.stat().st_size + len(text) > self.max_bytes:
                for number in range(OLDER_FILES - 1, 0, -1):
                    if self._older(number).is_file():
                        self._older(number).replace(self._older(number + 1))
                self.file.replace(self._older(1))
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a crash cut off the last line
                    text = b"\n" + text
                if os.write(descriptor, text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not size:
                self.workspace.sync_names()

    def _older(self, number: int) -> Path:
        return self.file.with_name(f"audit.{number}.jsonl")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.workspace.root / f".{AUDIT_FILE}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def subject_of(values: Any) -> str | None:
    """The id of the run or artifact in a call's arguments or answer; None for what has none, or no id."""
    names = ("run_id", "sweep_id", "artifact_id", "model_id", "cache_id")
    found = next((values[name] for name in names if isinstance(values, dict) and name in values), None)
    return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", found) else None


def client_name(session: Any) -> str:
    """What a client of the server calls itself; nothing proves it."""
    info = getattr(getattr(session, "client_params", None), "client_info", None)
    return f"{info.name} {info.version}" if info is not None else "a client without a name"


def audit_text(page: AuditPage) -> str:
    """A line per call: time, outcome, tool, subject, the first digits of the arguments' hash, client."""
    rows = [
        (entry.time, entry.outcome, entry.tool, entry.subject or "-", entry.arguments_sha256[:12], entry.client)
        for entry in page.entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)] if rows else []
    lines = ["  ".join([*map(str.ljust, row, widths), row[5]]) for row in rows]
    if page.unreadable:
        lines.append(f"{page.unreadable} lines cannot be read")
    return "\n".join(lines) or "no call that changed anything yet"
