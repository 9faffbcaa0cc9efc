"""Directories that are either complete or absent; for single files see `identity.files`, whose helpers are here too."""

import os
from pathlib import Path

from opd_mcp.identity.files import file_sha256, fsync_directory, write_atomic

__all__ = ["file_sha256", "fsync_directory", "fsync_tree", "publish_directory", "tree_bytes", "write_atomic"]


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


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(directory) for name in names)
