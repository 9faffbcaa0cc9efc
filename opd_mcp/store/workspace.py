"""The workspace: one private directory with a fixed layout for everything that the project writes."""

import os
import re
import secrets
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.errors import ArgumentError, PathError, nearest
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.runs import Quotas, StopSettings, WorkspaceSettings

# Secrets of the workspace itself: no reference of a caller opens them.
LINEAGE_KEY, HTTP_TOKEN, HTTP_SESSIONS = "lineage.key", "http.token", "http.sessions"
SECRET_FILES = frozenset({LINEAGE_KEY, HTTP_TOKEN, HTTP_SESSIONS})
ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)


def default_workspace_root() -> Path:
    """The platform's user data folder for opd-mcp."""
    from platformdirs import user_data_path

    return user_data_path("opd-mcp", appauthor=False)


@dataclass(frozen=True)
class Workspace:
    """The directories below `root`, made on construction, readable by their owner only."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        object.__setattr__(self, "root", self.root.resolve())
        require_private(self.root)
        kinds = map(self.artifacts_of, ARTIFACT_KINDS)
        for directory in (self.runs, self.artifacts, *kinds, self.plans, self.hub, self.compiled):
            directory.mkdir(exist_ok=True, mode=0o700)

    @property
    def runs(self) -> Path:
        """One directory per run."""
        return self.root / "runs"

    @property
    def artifacts(self) -> Path:
        """One directory per kind, with one directory per artifact."""
        return self.root / "artifacts"

    @property
    def plans(self) -> Path:
        """One file per plan."""
        return self.root / "plans"

    @property
    def hub(self) -> Path:
        """Models and data sets fetched from the Hub."""
        return self.root / "hub"

    @property
    def compiled(self) -> Path:
        """GPU code that workers compiled, kept for later workers; may be deleted."""
        return self.root / "compiled"

    @property
    def index(self) -> Path:
        """The SQLite index; may be deleted, it is rebuilt from the directories."""
        return self.root / "opd.sqlite"

    @property
    def index_note(self) -> Path:
        """Which index is the true one, and the lock of its writers; it outlives the index."""
        return self.root / "index.note"

    def artifacts_of(self, kind: ArtifactKind) -> Path:
        """Where artifacts of one kind are."""
        return self.artifacts / kind

    def run(self, run_id: str) -> Path:
        """A run's directory, whether it exists or not; `run_id` must be one that `is_id` accepts."""
        return self.runs / run_id


ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}", re.ASCII)


def new_id(label: str) -> str:
    """A readable id: the label in lower case with six random hex digits, e.g. `lightning-qwen3-0.6b-7f3a12`."""
    words = re.sub(r"[^a-z0-9.]+", "-", label.casefold()).strip("-.")[:60].rstrip("-.")
    return f"{words or 'run'}-{secrets.token_hex(3)}"


def is_id(text: str) -> bool:
    """Whether a text can be an id, so that it may become part of a path."""
    return ID_PATTERN.fullmatch(text) is not None


def require_private(folder: Path) -> None:
    """Remove other users' rights to an existing folder; raises PathError `unsafe_folder`.

    The error is for a symbolic link, and for a folder of another user, who could replace its contents.
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


SETTINGS_FILE = "settings.toml"


def read_settings(workspace: Workspace) -> WorkspaceSettings:
    """The settings, all absent without a file; raises ArgumentError `unknown_setting` or `invalid_setting`."""
    file = workspace.root / SETTINGS_FILE
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return WorkspaceSettings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(f"not TOML: {error}", str(file)) from error
    _require_known(values, WorkspaceSettings, "")
    for name, section in (("quotas", Quotas), ("stop", StopSettings)):
        if isinstance(values.get(name), dict):
            _require_known(values[name], section, f"{name}.")
    try:
        return WorkspaceSettings.model_validate(values)
    except ValidationError as error:
        raise _invalid(first_problem(error), str(file)) from error


def _require_known(values: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for name in values:
        if name not in model.model_fields:
            raise ArgumentError(
                "unknown_setting",
                f"{SETTINGS_FILE} holds a setting that there is not.",
                value=prefix + name,
                nearest=[prefix + other for other in nearest(name, model.model_fields)],
                fix=f"Correct or remove it; there are: {', '.join(prefix + field for field in model.model_fields)}.",
            )


def _invalid(why: str, file: str) -> ArgumentError:
    return ArgumentError(
        "invalid_setting", f"{SETTINGS_FILE} cannot be used ({why}).", value=file, fix="Correct it, or remove it."
    )


def grace_seconds(workspace: Workspace) -> float:
    """How long a worker may take to answer a cancel request or SIGTERM; the default while the settings are unusable."""
    try:
        return read_settings(workspace).stop.grace_seconds
    except ArgumentError:
        return StopSettings().grace_seconds
