"""Files that are either complete or absent: atomic writes, and the hash of what was written."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import IntegrityError

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 256 << 20


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


def publish_directory(building: Path, final: Path, check_fence: Callable[[], None] = lambda: None) -> None:
    """Give a finished directory its final name, durably; FileExistsError when there is one of that name.

    `check_fence` is asked last of all and raises when it must not have the name.
    """
    if final.exists():
        raise FileExistsError(final)
    fsync_tree(building)
    check_fence()  # only now: a large tree takes its time
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


def path_signature(path: Path) -> str:
    """What changes with a file, or with any file below a directory: names, sizes, times and inodes, not contents."""
    files = (
        [path]
        if path.is_file()
        else sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    )
    entries = []
    for file in files:
        with suppress(FileNotFoundError):  # a link to nothing, or gone by now
            stat = file.stat()
            entries.append([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return content_hash(entries)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises IntegrityError `damaged_file` for anything else."""
    size = path.stat().st_size
    try:
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes are more than {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
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
