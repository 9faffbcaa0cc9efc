"""Files that are either complete or absent: atomic writes, and the hash of what was written."""

import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, TypeVar

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import IntegrityError

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
MAX_RECORD_BYTES = 64 << 20

SchemaT = TypeVar("SchemaT", bound=Schema)


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o600) -> None:
    """Write a file so that a reader, or a restart at any moment, sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_tree(directory: Path) -> None:
    """Make every file and name below a directory survive a power loss."""
    for folder, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))


def publish_directory(building: Path, final: Path) -> None:
    """Give a finished directory its final name, durably; FileExistsError when there is one of that name."""
    if final.exists():
        raise FileExistsError(final)
    fsync_tree(building)
    try:
        os.rename(building, final)
    except OSError as error:
        if final.exists():  # another process was faster; both names are on one file system
            raise FileExistsError(final) from error
        raise
    fsync_directory(final.parent)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def bounded_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; raises ValueError for a longer file, or another kind, which is never waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes are more than {limit}")
        return file.read(limit)


def read_json_object(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises IntegrityError `damaged_file` for anything else."""
    try:
        value = json.loads(bounded_bytes(path, limit))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            "damaged_file",
            f"{path.name} is not a readable JSON object ({error}).",
            value=path,
            fix="Restore the file, e.g. by copying or downloading the directory again.",
        ) from error
    return value


def read_schema(path: Path, schema: type[SchemaT], *, fix: str) -> SchemaT:
    """The record that `schema.to_json` wrote into a file; raises IntegrityError `damaged_file` for anything else."""
    try:
        return schema.from_json(bounded_bytes(path, MAX_RECORD_BYTES))
    except (ValueError, RecursionError, OSError) as error:  # pydantic's ValidationError is a ValueError
        raise IntegrityError(
            "damaged_file", f"{path.name} is missing or not a record this version can read.", value=path, fix=fix
        ) from error
