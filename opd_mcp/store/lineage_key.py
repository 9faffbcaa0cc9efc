"""`lineage.key`: the secret with which a workspace signs the lineage of everything it publishes."""

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from opd_mcp.identity.files import bounded_bytes, write_atomic
from opd_mcp.identity.signatures import LineageKey
from opd_mcp.schemas.base import Record, first_problem
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import Workspace

KEY_FILE = "lineage.key"
SECRET_BYTES = 32
MAX_KEY_BYTES = 4096


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
    file = workspace.root / KEY_FILE
    if not file.is_file():
        _make(file)
    try:
        record = KeyRecord.from_json(bounded_bytes(file, MAX_KEY_BYTES))
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file",
            f"{KEY_FILE} cannot be used ({first_problem(error)}).",
            value=file,
            fix="Restore it from a copy; or remove it, and lineages that it signed count as asserted from then on.",
        ) from error
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
    return WorkspaceKey(LineageKey(bytes.fromhex(record.secret)), record.created_at)


def _make(file: Path) -> None:
    descriptor = os.open(file.with_name(f".{KEY_FILE}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not file.is_file():
            record = KeyRecord(secret=secrets.token_hex(SECRET_BYTES), created_at=utc_now())
            write_atomic(file, record.sealed().to_json(indent=2) + "\n")
    finally:
        os.close(descriptor)
