"""The recipe's keys as an agent reads them: in a plan with their values, and all of them as the resource."""

import json
from collections.abc import Mapping
from typing import Any, get_args

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.recipes import Preset, Recipe
from opd_mcp.schemas.resolve import recipe_keys, resolve_recipe

KEYS_URI = "opd://recipe-keys"
SECTIONS_OF_PHASE = {"generate_responses": "responses"}
COMMON_SECTIONS = ("runtime", "prompting", "checkpoint")
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def setting_lines(plan: Plan) -> list[str]:
    """The keys that this plan's phases use, each with its value: what `overrides` may change."""
    used = {SECTIONS_OF_PHASE.get(phase.name, phase.name) for phase in plan.phases} | set(COMMON_SECTIONS)
    sections: dict[str, list[str]] = {}
    for key in recipe_keys():
        section, _, name = key.partition(".")
        if section in used and not _is_off(plan.recipe, key):
            sections.setdefault(section, []).append(f"{name}={_short(_value(plan.recipe, key))}")
    lines = [f"  {section}.: {', '.join(parts)}" for section, parts in sections.items()]
    return [f"settings (overrides take the dotted keys, e.g. distill.steps; explained in {KEYS_URI}):", *lines]


def recipe_keys_text() -> str:
    """Markdown: every key that an override may name, its values in the three presets, and what it means."""
    presets = {preset: resolve_recipe(preset, {}) for preset in get_args(Preset)}
    lines = [
        "# Recipe keys",
        "",
        '`overrides` of plan_distillation, e.g. {"distill.steps": 200, "runtime.seed": 1}.',
        "",
        f"| key | {' | '.join(presets)} | allowed | meaning |",
        "|---" * (len(presets) + 3) + "|",
    ]
    schema = Recipe.model_json_schema()
    for key in recipe_keys():
        leaf = _leaf(schema, key)
        values = [_short(_value(recipe, key)) for recipe in presets.values()]
        lines.append(f"| {' | '.join([key, *values, _allowed(leaf), leaf.get('description', '')])} |")
    return "\n".join(lines) + "\n"


def _leaf(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON schema of one key."""
    found: Mapping[str, Any] = schema
    for name in key.split("."):
        section = next((part for part in found.get("anyOf", ()) if "$ref" in part), found)
        section = schema["$defs"][section["$ref"].rsplit("/", 1)[1]] if "$ref" in section else section
        found = section["properties"][name]
    return found


def _allowed(leaf: Mapping[str, Any]) -> str:
    """Choices, or type and bounds."""
    if "anyOf" in leaf:
        return " or ".join(_allowed(part) for part in leaf["anyOf"])
    if "$ref" in leaf:
        return "object"
    if "enum" in leaf:
        return ", ".join(leaf["enum"])
    return " ".join([leaf["type"], *(f"{sign} {leaf[name]}" for name, sign in BOUNDS.items() if name in leaf)])


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name, None)  # None: the section is off
    return value.to_dict() if isinstance(value, Schema) else value


def _is_off(recipe: Recipe, key: str) -> bool:
    """Whether a key belongs to a section that the recipe leaves out."""
    return _value(recipe, key.rpartition(".")[0]) is None


def _short(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
