"""Folders that only their owner may enter."""

import os
import stat
from pathlib import Path

from opd_mcp.schemas.errors import PathError


def require_private(folder: Path) -> None:
    """Take away everybody else's rights to an existing folder; raises PathError `unsafe_folder`.

    That is for a symbolic link, and for a folder of another user, who could swap what is in it.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PathError(
            "unsafe_folder",
            "This folder is a link, or belongs to another user.",
            value=folder,
            fix="Remove it, or choose a folder of your own (OPD_HOME for the workspace).",
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
