"""The workspace's `settings.toml`: read anew at each use, so that a change holds for the next start."""

import tomllib
from typing import Any

from pydantic import BaseModel, ValidationError

from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.errors import ArgumentError, nearest
from opd_mcp.schemas.runs import Quotas, WorkspaceSettings
from opd_mcp.store.workspace import Workspace

SETTINGS_FILE = "settings.toml"


def read_settings(workspace: Workspace) -> WorkspaceSettings:
    """The settings, all absent where there is no file; raises ArgumentError `unknown_setting` or `invalid_setting`."""
    file = workspace.root / SETTINGS_FILE
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return WorkspaceSettings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(f"not TOML: {error}", str(file)) from error
    _require_known(values, WorkspaceSettings, "")
    if isinstance(values.get("quotas"), dict):
        _require_known(values["quotas"], Quotas, "quotas.")
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
