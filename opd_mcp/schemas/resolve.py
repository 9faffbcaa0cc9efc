"""From a preset and dotted overrides to a resolved recipe, with errors that name the nearest key."""

import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ValidationError

from opd_mcp.schemas.errors import ArgumentError, nearest
from opd_mcp.schemas.precision import require_kept_updates, require_package
from opd_mcp.schemas.recipes import Preset, Recipe


def preset_values(preset: Preset) -> dict[str, Any]:
    """The preset's file as nested values."""
    text = (files("opd_mcp.schemas") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that an override may name."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from recipe_keys(annotation, f"{prefix}{name}.")
        elif prefix:
            yield prefix + name


def resolve_recipe(preset: Preset, overrides: Mapping[str, Any]) -> Recipe:
    """The preset with the overrides applied.

    Raises ArgumentError: `unknown_override` with the nearest keys, `invalid_argument` for a bad value, or
    `lossy_precision` where bf16 would round training away; ResourceError `missing_package` for a precision whose
    library is not installed.
    """
    values = _merged(Recipe().model_dump(), preset_values(preset))
    valid = set(recipe_keys())
    for key, value in overrides.items():
        if key not in valid:
            raise ArgumentError(
                "unknown_override",
                "There is no such recipe key.",
                value=key,
                nearest=nearest(key, valid) or sorted(k for k in valid if k.split(".")[0] == key.split(".")[0]),
                fix="Use a dotted key such as 'distill.steps'; the resource opd://recipe-keys lists all of them.",
            )
        section = values
        *parents, name = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    try:
        recipe = Recipe.model_validate({**values, "preset": preset})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ArgumentError(
            "invalid_argument",
            f"Override {key}: {first['msg']}.",
            value=first.get("input"),
            fix=f"Give {key} a valid value.",
        ) from error
    for part, optimizer in (("sft.optimizer", recipe.sft.optimizer), ("distill.optimizer", recipe.distill.optimizer)):
        require_kept_updates(optimizer, part)
        require_package(optimizer, part)
    return recipe


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
