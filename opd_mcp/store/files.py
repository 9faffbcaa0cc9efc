"""Directories measured (bytes, hashes), and what a full or missing disk makes of an error."""

import errno
import os
import shutil
from pathlib import Path

from opd_mcp.identity.files import file_sha256
from opd_mcp.schemas.errors import IntegrityError, OpdError, PathError, ResourceError

DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "database or disk is full")


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


def disk_full(error: BaseException) -> ResourceError:
    """The error of a call that found the disk full: nothing was started."""
    return ResourceError(
        "not_enough_disk",
        f"The disk is full: nothing was begun ({str(error)[:300]}).",
        fix="Free disk space (opd-mcp gc shows what is unused), then make the call again.",
    )


def expected_failure(error: BaseException) -> OpdError | None:
    """The caller's error for a full disk, a name that is not UTF-8 or a native library's panic; or None.

    A panic is no Exception, and would end the process.
    """
    if isinstance(error, UnicodeEncodeError) and "surrogate" in error.reason:
        return PathError(
            "unusable_name",
            "The name of a file or folder is not UTF-8, so no record can hold it.",
            value=error.object[-200:],
            fix="Rename it, or give the path of a file that does not lie in or next to it.",
        )
    if type(error).__name__ == "PanicException":
        return IntegrityError(
            "damaged_file",
            f"A native library gave up on one of the files that were given ({str(error)[:300]}).",
            fix="Look at tokenizer.json of the models of this call, its patterns above all; give another model.",
        )
    return disk_full(error) if is_disk_full(error) else None


def workspace_failure(error: OSError, root: Path) -> OpdError | None:
    """The caller's error for a workspace that was moved, or a file in it that could not be used; or None."""
    if not root.is_dir():
        return workspace_missing(root)
    if error.filename is not None and root in Path(os.fsdecode(error.filename)).parents:
        return ResourceError(
            "workspace_unusable",
            f"A file of the workspace cannot be used ({error.strerror}).",
            value=error.filename,
            fix="Check that the workspace's folder may be read and written; opd-mcp doctor looks through it.",
        )
    return None


def workspace_missing(root: Path) -> PathError:
    """The error of a workspace that was moved or removed while it was in use."""
    return PathError(
        "workspace_missing",
        "The workspace's folder is no longer there.",
        value=root,
        fix="Move it back, or restart the server with OPD_HOME set to where it is now.",
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed because disk or quota was full; libraries that hide the errno keep it in their text."""
    if error is None:
        return False
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = any(text in str(error) for text in DISK_FULL_TEXTS)
    return numbered or told or is_disk_full(error.__cause__)
