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
# Far above the largest known file of each kind, far below what would stop a server.
MAX_CONFIG_BYTES = 1 << 20
MAX_JSON_DEPTH = 64


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


def publish_file(building: Path, final: Path) -> None:
    """Give a finished file its final name, durably, in place of an earlier one."""
    descriptor = os.open(building, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(building, final)
    fsync_directory(final.parent)


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


def bounded_bytes(path: Path, limit: int) -> bytes:
    """A file's content; raises IntegrityError `damaged_file`, before reading on, for more than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _unreadable(path, f"it has more than {limit} bytes")
    return content


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; raises IntegrityError `damaged_file` for anything else."""
    return parsed_object(bounded_bytes(path, limit), path)


def parsed_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the content of the file `path`, nested at most `MAX_JSON_DEPTH` deep.

    Raises IntegrityError `damaged_file` for anything else.
    """
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if _deeper_than(value, MAX_JSON_DEPTH):
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for item in children for child in item if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _unreadable(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "damaged_file",
        f"{path.name} is no JSON that can be read ({why}).",
        value=path,
        fix="Restore the file, e.g. by copying or downloading the directory again.",
    )
