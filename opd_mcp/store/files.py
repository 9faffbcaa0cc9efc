"""What the store needs of `identity.files`, and what is in a directory: how many bytes, which hashes."""

import os
import shutil
from pathlib import Path

from opd_mcp.identity.files import file_sha256, fsync_directory, fsync_tree, publish_directory, write_atomic

__all__ = [
    "file_sha256",
    "free_bytes",
    "fsync_directory",
    "fsync_tree",
    "publish_directory",
    "tree_bytes",
    "tree_sha256",
    "write_atomic",
]


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds the path's directory."""
    return shutil.disk_usage(path.parent).free


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(directory) for name in names)


def tree_sha256(directory: Path) -> dict[str, str]:
    """By path below the directory, sha256 of each file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
