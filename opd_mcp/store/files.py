"""What the store needs of `identity.files`, and how large a directory is."""

import os
from pathlib import Path

from opd_mcp.identity.files import file_sha256, fsync_directory, fsync_tree, publish_directory, write_atomic

__all__ = ["file_sha256", "fsync_directory", "fsync_tree", "publish_directory", "tree_bytes", "write_atomic"]


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(directory) for name in names)
