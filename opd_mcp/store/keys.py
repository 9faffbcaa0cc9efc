"""The workspace's secrets, each in a file for its owner alone.

`lineage.key` signs the lineage of everything that the workspace publishes; `http.token` lets HTTP clients in;
`http.sessions` is no secret, but ends the dashboards' sessions when it changes.
"""

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from opd_mcp.identity.files import bounded_bytes, fsync_directory, write_atomic
from opd_mcp.identity.signatures import LineageKey
from opd_mcp.schemas.base import Record, first_problem
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import HTTP_SESSIONS, HTTP_TOKEN, LINEAGE_KEY, Workspace

SECRET_BYTES = 32
MAX_KEY_BYTES = 4096
TOKEN_BYTES = 32


class KeyRecord(Record):
    """`lineage.key`, readable by its owner only."""

    secret: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: str


@dataclass(frozen=True)
class WorkspaceKey:
    """A workspace's key, and when it was made."""

    key: LineageKey
    created_at: str


def workspace_key(workspace: Workspace) -> WorkspaceKey:
    """The key of a workspace, made at its first use by the first process.

    Raises IntegrityError `damaged_file` for a key file that cannot be used.
    """
    file = workspace.root / LINEAGE_KEY
    if not file.is_file():
        _make(file)
    try:
        record = KeyRecord.from_json(bounded_bytes(file, MAX_KEY_BYTES))
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file",
            f"{LINEAGE_KEY} cannot be used ({first_problem(error)}).",
            value=file,
            fix="Restore it from a copy; or remove it, and lineages that it signed count as asserted from then on.",
        ) from error
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
    return WorkspaceKey(LineageKey(bytes.fromhex(record.secret)), record.created_at)


def _make(file: Path) -> None:
    descriptor = os.open(file.with_name(f".{LINEAGE_KEY}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not file.is_file():
            record = KeyRecord(secret=secrets.token_hex(SECRET_BYTES), created_at=utc_now())
            write_atomic(file, record.sealed().to_json(indent=2) + "\n")
    finally:
        os.close(descriptor)


class WatchedFile:
    """A small text file that is read again when it has changed; empty while it is missing or cannot be read.

    `made`: whether it was not there before.
    """

    def __init__(self, path: Path, made: bool = False) -> None:
        self.path = path
        self.made = made
        self._seen: tuple[int, int, int] | None = None
        self._text = ""

    def __call__(self) -> str:
        try:
            found = os.stat(self.path)
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                with self.path.open("rb") as file:
                    self._text = file.read(MAX_KEY_BYTES).decode("utf-8").strip()
                self._seen = seen
        except (OSError, UnicodeDecodeError):
            self._seen, self._text = None, ""
        return self._text


def workspace_token(workspace: Workspace) -> WatchedFile:
    """The workspace's token file, made at its first use; only its owner can read it."""
    file = workspace.root / HTTP_TOKEN
    made = False
    if not file.is_file():
        own = file.with_name(f".{HTTP_TOKEN}.{secrets.token_hex(6)}.tmp")
        write_atomic(own, secrets.token_urlsafe(TOKEN_BYTES) + "\n")
        try:
            os.link(own, file)  # of two servers that start at once, one makes the token of both
            made = True
        except FileExistsError:
            pass
        finally:
            own.unlink()
        fsync_directory(workspace.root)
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
    return WatchedFile(file, made)


def replace_token(workspace: Workspace) -> None:
    """Make a new token; servers of the workspace refuse the old one from their next request on."""
    write_atomic(workspace.root / HTTP_TOKEN, secrets.token_urlsafe(TOKEN_BYTES) + "\n")


def end_sessions(workspace: Workspace) -> None:
    """End all sessions of dashboards; the token stays."""
    write_atomic(workspace.root / HTTP_SESSIONS, secrets.token_hex(16) + "\n")


def session_mark(workspace: Workspace) -> WatchedFile:
    """The text that ends the dashboards' sessions when it changes."""
    return WatchedFile(workspace.root / HTTP_SESSIONS)
