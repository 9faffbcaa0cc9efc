"""What the store needs of `identity.files`, and how large a directory is."""

import os
import stat
from pathlib import Path

from opd_mcp.identity.files import file_sha256, fsync_directory, fsync_tree, publish_directory, write_atomic
from opd_mcp.schemas.errors import PathError

__all__ = [
    "file_sha256",
    "fsync_directory",
    "fsync_tree",
    "make_private",
    "publish_directory",
    "tree_bytes",
    "write_atomic",
]


def make_private(directory: Path) -> None:
    """Make a folder that only this user may enter, or close one that others may.

    Raises PathError `unsafe_folder` for one of another user, one that is shared by everybody, or a link to a folder.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & stat.S_ISVTX:
        raise PathError(
            "unsafe_folder",
            "This folder is a link, another user's, or shared by everybody; what is kept here must be this user's own.",
            value=directory,
            fix="Give a folder of your own: OPD_HOME for the workspace, XDG_RUNTIME_DIR for the device leases.",
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        directory.chmod(0o700)


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(directory) for name in names)
