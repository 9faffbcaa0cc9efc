"""The workspace: one private directory with a fixed layout for everything that the project writes.

Its plans are here too, one file each, so that a `plan_id` means the same plan in every process.
"""

import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from opd_mcp.identity.files import fsync_directory, write_atomic
from opd_mcp.schemas.base import Record, Schema, first_problem
from opd_mcp.schemas.errors import ArgumentError, IntegrityError, PathError, UnknownIdError, nearest
from opd_mcp.schemas.executors import LOCAL, ExecutorSettings, RayExecutor, SlurmExecutor, SshExecutor
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.next_action import plan_call
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import (
    EngineSettings,
    ExportSettings,
    Quotas,
    StopSettings,
    TrackingSettings,
    WorkspaceSettings,
)

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

    def sync_names(self) -> None:
        """Make new names directly below the root survive a power loss."""
        fsync_directory(self.root)

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
    def tracking(self) -> Path:
        """What is kept for experiment trackers; made by the first run that is mirrored."""
        return self.root / "tracking"

    def tracking_of(self, run_id: str) -> Path:
        """Where the mirrors of a run keep their places and logs."""
        return self.tracking / "runs" / run_id

    @property
    def compiled(self) -> Path:
        """GPU code that workers compiled, kept for later workers; may be deleted."""
        return self.root / "compiled"

    @property
    def engines(self) -> Path:
        """Engines that were installed here, one environment each; made by the first."""
        return self.root / "engines"

    @property
    def index(self) -> Path:
        """The SQLite index; may be deleted, it is rebuilt from the directories.

        Machines that share a workspace have one each: SQLite's log needs the memory of one machine.
        """
        return index_folder(self) / "opd.sqlite"

    @property
    def index_note(self) -> Path:
        """Which index is the true one, and the lock of its writers; it outlives the index."""
        return self.index.with_name("index.note")

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
EXECUTORS: dict[str, type[BaseModel]] = {"slurm": SlurmExecutor, "ssh": SshExecutor, "ray": RayExecutor}


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
    sections: dict[str, type[BaseModel]] = {
        "quotas": Quotas,
        "stop": StopSettings,
        "export": ExportSettings,
        "engines": EngineSettings,
        "tracking": TrackingSettings,
    }
    for name, section in sections.items():
        if isinstance(values.get(name), dict):
            _require_known(values[name], section, f"{name}.")
    for name, given in _tables(values.get("executors")):
        if (kind := EXECUTORS.get(str(given.get("kind")))) is not None:
            _require_known(given, kind, f"executors.{name}.")
    try:
        return WorkspaceSettings.model_validate(values)
    except ValidationError as error:
        raise _invalid(first_problem(error), str(file)) from error


def write_setting(workspace: Workspace, section: str, name: str, value: str) -> None:
    """Set a text in a section of settings.toml; every other line stays as it is.

    Raises ArgumentError `invalid_setting` where the file is not readable, or is written so that a line cannot be added.
    """
    read_settings(workspace)
    file = workspace.root / SETTINGS_FILE
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    wanted = tomllib.loads(text)
    known = wanted.setdefault(section, {})
    line, heading = f"{name} = {json.dumps(value, ensure_ascii=False)}", f"[{section}]"
    kept = [row for row in text.splitlines() if not (name in known and row.split("=")[0].strip() == name)]
    place = next((number + 1 for number, row in enumerate(kept) if row.split("#")[0].strip() == heading), None)
    if place is None:
        kept += [*([""] if kept else []), heading, line]
    else:
        kept.insert(place, line)
    known[name] = value
    changed = "\n".join(kept) + "\n"
    try:
        as_wanted = tomllib.loads(changed) == wanted
    except tomllib.TOMLDecodeError:
        as_wanted = False
    if not as_wanted:
        raise _invalid(f"no line can be added to it safely; below {heading} it needs: {line}", str(file))
    write_atomic(file, changed)


def _tables(value: object) -> list[tuple[str, dict[str, Any]]]:
    return (
        [(name, table) for name, table in value.items() if isinstance(table, dict)] if isinstance(value, dict) else []
    )


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


def index_folder(workspace: Workspace) -> Path:
    """Where this machine keeps its index; a folder of its own once the settings name executors."""
    try:
        settings = read_settings(workspace)
    except ArgumentError:
        return workspace.root
    if settings.index_folder is None and not settings.executors:
        return workspace.root
    if settings.index_folder is None:
        name = f"opd-mcp-{os.geteuid()}-{hashlib.sha256(os.fsencode(workspace.root)).hexdigest()[:12]}"
        folder = Path(tempfile.gettempdir()) / name
    else:
        folder = Path(settings.index_folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder)
    return folder


def named_executor(workspace: Workspace, name: str) -> ExecutorSettings:
    """The settings of an executor; raises ArgumentError `unknown_executor`, and as `read_settings`."""
    known = read_settings(workspace).executors
    if name in known:
        return known[name]
    raise ArgumentError(
        "unknown_executor",
        "The workspace's settings name no such executor.",
        value=name,
        nearest=nearest(name, [LOCAL, *known]),
        fix=f"Give one of: {', '.join([LOCAL, *known])}; or add [executors.NAME] to {SETTINGS_FILE}.",
    )


def has_executors(workspace: Workspace) -> bool:
    """Whether the settings name executors; not while they are unusable."""
    try:
        return bool(read_settings(workspace).executors)
    except ArgumentError:
        return False


def is_shared(workspace: Workspace) -> bool:
    """Whether other machines may write in this workspace."""
    return workspace.index.parent != workspace.root


def grace_seconds(workspace: Workspace) -> float:
    """How long a worker may take to answer a cancel request or SIGTERM; the default while the settings are unusable."""
    try:
        return read_settings(workspace).stop.grace_seconds
    except ArgumentError:
        return StopSettings().grace_seconds


def wants_tracking(workspace: Workspace) -> bool:
    """Whether the settings name a tracker; not while they are unusable."""
    try:
        return bool(read_settings(workspace).tracking.trackers)
    except ArgumentError:
        return False


def export_folders(workspace: Workspace) -> list[Path]:
    """The absolute folders that the settings let models be exported to; none while the settings are unusable."""
    try:
        folders = [Path(root).expanduser() for root in read_settings(workspace).export.roots]
    except ArgumentError:
        return []
    return [folder for folder in folders if folder.is_absolute()]


def hub_owners(workspace: Workspace) -> list[str]:
    """The owners on the Hub that the settings let models be uploaded for; none while the settings are unusable."""
    try:
        return read_settings(workspace).export.hub
    except ArgumentError:
        return []


Content = TypeVar("Content", bound=Schema)


def _with_next_action_as_data(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had the next call as a sentence."""
    plan = values.get("plan")
    if not isinstance(plan, dict):
        return values
    return {**values, "plan": {**plan, "next_action": {"why": plan.get("next_action")}}}


class SavedPlan(Record):
    """`plans/<plan_id>.json`."""

    upgrades = (_with_next_action_as_data,)
    plan: Plan


def save_plan(workspace: Workspace, plan: Plan, arguments: PlanDistillation) -> None:
    """Save a plan and its arguments under its id; the same plan writes the same files."""
    write_atomic(_arguments_file(workspace, plan.plan_id), arguments.to_json(indent=2) + "\n")
    write_atomic(_plan_file(workspace, plan.plan_id), SavedPlan(plan=plan).sealed().to_json(indent=2) + "\n")


def read_plan(workspace: Workspace, plan_id: str) -> Plan:
    """The plan of an id; raises UnknownIdError `unknown_plan` with the nearest ids, IntegrityError `damaged_file`."""
    if is_id(plan_id) and _plan_file(workspace, plan_id).is_file():
        return _read(SavedPlan, _plan_file(workspace, plan_id)).plan
    raise UnknownIdError(
        "unknown_plan",
        "There is no such plan in this workspace.",
        value=plan_id,
        nearest=nearest(plan_id, [path.stem for path in workspace.plans.glob("*.json")]),
        fix="Plan a distillation and give the plan_id of the answer.",
        call=plan_call(),
    )


def read_arguments(workspace: Workspace, plan: Plan) -> PlanDistillation:
    """The arguments of a saved plan; raises IntegrityError `damaged_file`."""
    return _read(PlanDistillation, _arguments_file(workspace, plan.plan_id))


def _plan_file(workspace: Workspace, plan_id: str) -> Path:
    return workspace.plans / f"{plan_id}.json"


def _arguments_file(workspace: Workspace, plan_id: str) -> Path:
    return workspace.plans / f"{plan_id}.arguments"


def _read(kind: type[Content], file: Path) -> Content:
    try:
        return kind.from_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise IntegrityError(
            "damaged_file",
            f"The plan cannot be used ({why}).",
            value=file,
            fix="Plan again with the same arguments.",
            call=plan_call(),
        ) from error
