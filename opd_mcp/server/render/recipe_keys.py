"""The recipe's keys as an agent reads them: in a plan with their values, and all of them as the resource."""

import json
from collections.abc import Iterable
from typing import Any, get_args

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.recipes import Preset, Recipe
from opd_mcp.schemas.resolve import allowed_text, key_schema, recipe_keys, resolve_recipe

KEYS_URI = "opd://recipe-keys"
SECTIONS_OF_PHASE = {"generate_responses": "responses"}
COMMON_SECTIONS = ("runtime", "prompting", "checkpoint")


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
    about = '`overrides` of plan_distillation, e.g. {"distill.steps": 200, "runtime.seed": 1}.'
    return "\n".join(["# Recipe keys", "", about, "", *key_table(recipe_keys())]) + "\n"


def key_table(keys: Iterable[str]) -> list[str]:
    """The lines of a Markdown table: each key with its values in the presets, what is allowed, and what it means."""
    presets = {preset: resolve_recipe(preset, {}) for preset in get_args(Preset)}
    lines = [f"| key | {' | '.join(presets)} | allowed | meaning |", "|---" * (len(presets) + 3) + "|"]
    for key in keys:
        leaf = key_schema(key)
        values = [_short(_value(recipe, key)) for recipe in presets.values()]
        cells = [key, *values, allowed_text(leaf), leaf.get("description", "")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


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
