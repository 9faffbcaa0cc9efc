"""The allowed roots, below which files are read for a caller, and the export roots, below which models are written.

Symbolic links are resolved before anything is compared.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from opd_mcp.schemas.errors import PathError, nearest
from opd_mcp.store.workspace import SECRET_FILES

# Model, data and cache directories are shallow; nothing deeper is opened.
LINK_DEPTH = 3
HUB_PREFIX = "hub:"
"""How a destination begins that is a repository of the Hub: hub:OWNER/NAME."""
HUB_REPOSITORY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,95})/([A-Za-z0-9][A-Za-z0-9._-]{0,95})", re.ASCII)
EXPORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
"""The name of an exported model, which stands in its card and in commands."""


class AllowedRoots:
    """Directories below which references may point."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots))

    def resolve(self, reference: str | Path) -> Path:
        """The real path of an absolute reference below a root.

        Raises PathError: `relative_path`, `outside_roots` (also for a link that leads out), `special_file` for what is
        neither a file nor a directory (opening a pipe would block forever), `not_found` with the nearest names.
        """
        text = str(reference)
        path = Path(text)
        if not path.is_absolute():
            raise PathError(
                "relative_path",
                f"A relative path means nothing to a server. Allowed roots: {self._names()}.",
                value=text,
                fix="Give the absolute path.",
            )
        try:
            real = path.resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
            raise self._not_found(text, [], f"This cannot be a path ({error}).") from error
        if not self.contains(real):
            raise self._outside(text, "The path is outside of the allowed roots")
        if real.name in SECRET_FILES:
            raise self._outside(text, "This file is a workspace's own secret, not one of the files that are read")
        if not os.path.exists(real):
            raise self._not_found(text, self._siblings(real), "There is no such file or directory.")
        if real.is_dir():
            self._require_inner_links(real)
        else:
            _require_plain(real)
        return real

    def contains(self, real: Path) -> bool:
        """Whether a path without links is a root or below one."""
        return any(real == root or root in real.parents for root in self.roots)

    def _require_inner_links(self, directory: Path) -> None:
        for folder, folders, names in os.walk(directory):
            if len(Path(folder).relative_to(directory).parts) >= LINK_DEPTH - 1:
                folders.clear()
            for name in (*folders, *names):
                entry = Path(folder) / name
                if entry.is_symlink() and not self.contains(Path(os.path.realpath(entry))):
                    raise self._outside(str(entry), "A link in this directory leads out of the allowed roots")
                _require_plain(entry)

    def _siblings(self, real: Path) -> list[str]:
        parent = real.parent
        while not parent.is_dir():
            real, parent = parent, parent.parent
        if not self.contains(parent):
            return []
        return [str(parent / name) for name in nearest(real.name, os.listdir(parent))]

    def _outside(self, text: str, what: str) -> PathError:
        return PathError(
            "outside_roots",
            f"{what}: {self._names()}.",
            value=text,
            fix="Move it below one of them, or start the server with --allow-root DIR.",
        )

    def _not_found(self, text: str, close: list[str], what: str) -> PathError:
        return PathError("not_found", what, value=text, nearest=close, fix="Check the path.")

    def _names(self) -> str:
        return ", ".join(map(str, self.roots))


class ExportRoots:
    """Where models may be exported to: below these folders, never in the workspace; to the Hub, for these owners."""

    def __init__(self, roots: Iterable[Path], workspace: Path, hub_owners: Iterable[str] = ()) -> None:
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots))
        self.workspace = workspace
        self.hub_owners = tuple(dict.fromkeys(hub_owners))

    def destination(self, given: str) -> str:
        """A new directory or `hub:OWNER/NAME` that may be exported to; raises PathError as the two methods below."""
        return self.hub_repository(given) if given.startswith(HUB_PREFIX) else str(self.new_directory(given))

    def hub_repository(self, destination: str) -> str:
        """`hub:OWNER/NAME` of an owner that is allowed; raises PathError `unusable_name`, `outside_roots`."""
        named = HUB_REPOSITORY.fullmatch(destination.removeprefix(HUB_PREFIX))
        if named is None or "--" in destination or ".." in destination or destination.endswith((".git", ".ipynb")):
            raise PathError(
                "unusable_name",
                "This is not a repository of the Hub.",
                value=destination,
                fix="Give hub:OWNER/NAME: letters, digits, '.', '_' and '-', without '--' or '..'.",
            )
        if named[1] not in self.hub_owners:
            allowed = ", ".join(self.hub_owners) or "nobody"
            raise PathError(
                "outside_roots",
                f"The owners that this server may upload for: {allowed}.",
                value=destination,
                nearest=[f"{HUB_PREFIX}{owner}/{named[2]}" for owner in self.hub_owners],
                fix="Export to a folder, or ask the user to start the server with --export-hub OWNER.",
            )
        return destination

    def new_directory(self, destination: str) -> Path:
        """The real path of a directory that may be made.

        Raises PathError: `relative_path`, `unusable_name`, `outside_roots` without or outside of
        the export roots, `not_found` for a missing parent, `destination_exists`.
        """
        path = Path(destination)
        if not path.is_absolute():
            raise PathError(
                "relative_path",
                "A model is exported to an absolute path, or to hub:OWNER/NAME.",
                value=destination,
                fix=f"Give an absolute path{self._below()}.",
            )
        if not EXPORT_NAME.fullmatch(path.name):
            raise PathError(
                "unusable_name",
                "The last part of the destination names the model: letters, digits, '.', '_' and '-', 96 at most.",
                value=destination,
                fix="Choose such a name.",
            )
        try:
            parent = path.parent.resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, a loop of links
            raise PathError(
                "not_found", f"This cannot be a path ({error}).", value=destination, fix="Check the path."
            ) from error
        inside = any(parent == root or root in parent.parents for root in self.roots)
        if not inside or parent == self.workspace or self.workspace in parent.parents:
            raise PathError(
                "outside_roots",
                f"Models are exported below {', '.join(map(str, self.roots))}."
                if self.roots
                else "This server has no export root, so it writes no model anywhere.",
                value=destination,
                fix="Choose a destination there (and outside of the workspace), or ask the user to start the server "
                "with --export-root DIR.",
            )
        if not parent.is_dir():
            raise PathError(
                "not_found", "The folder of the destination does not exist.", value=destination, fix="Make it first."
            )
        if os.path.lexists(parent / path.name):
            raise destination_exists(parent / path.name)
        return parent / path.name

    def _below(self) -> str:
        return f" below {self.roots[0]}" if self.roots else ""


def destination_exists(path: Path | str) -> PathError:
    """The error for an export that would replace something, here or on the Hub."""
    return PathError(
        "destination_exists",
        "There is something of this name already; an export never replaces anything.",
        value=path,
        fix="Choose another name, or remove what is there.",
    )


def _require_plain(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # a link to nothing, or gone by now
        return
    except OSError:  # a loop of links
        mode = 0
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PathError(
            "special_file",
            "This is a pipe, socket, device or broken link, not a file.",
            value=path,
            fix="Give a plain file or directory.",
        )
