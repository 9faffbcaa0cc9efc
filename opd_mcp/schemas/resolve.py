"""From a preset and dotted overrides to a resolved recipe, with errors that name the nearest key."""

import copy
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from opd_mcp.schemas.errors import ArgumentError, ResourceError, nearest
from opd_mcp.schemas.memory import keeps_float32
from opd_mcp.schemas.recipes import DistillRecipe, OptimizerRecipe, Preset, Recipe, Replicas, SftRecipe, base_form


def preset_values(preset: Preset) -> dict[str, Any]:
    """The preset's file as nested values."""
    text = (files("opd_mcp.schemas") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that an override may name; a section that is off by default may be named as a whole as well."""
    for name, field in model.model_fields.items():
        sections = [part for part in (field.annotation, *get_args(field.annotation)) if _is_section(part)]
        if prefix and field.annotation not in sections:
            yield prefix + name
        for section in sections:
            yield from recipe_keys(section, f"{prefix}{name}.")


def leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The dotted names of a nested record's values."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    nested = (leaves(part, f"{prefix}.{name}" if prefix else str(name)) for name, part in value.items())
    return [leaf for part in nested for leaf in part]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def recipe_arguments(path: Path) -> dict[str, Any]:
    """A recipe file as arguments of plan_distillation: its tables become dotted overrides, the rest stays."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    plain = {name: value for name, value in content.items() if name not in tables}
    return plain | {"overrides": dict(dotted(tables, set(recipe_keys())))}


def dotted(tables: Mapping[str, Any], keys: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; a table that is itself a recipe's value stays whole."""
    for name, value in tables.items():
        key = prefix + name
        if isinstance(value, dict) and key not in keys:
            yield from dotted(value, keys, f"{key}.")
        else:
            yield key, value


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """The overrides that make the recipe of its preset."""
    keys = set(recipe_keys())
    preset = dict(dotted(resolve_recipe(recipe.preset, {}).model_dump(mode="json"), keys))
    mine = dict(dotted(recipe.model_dump(mode="json"), keys))
    return {key: value for key, value in mine.items() if key in keys and preset.get(key) != value}


def resolve_recipe(preset: Preset, overrides: Mapping[str, Any]) -> Recipe:
    """The preset with the overrides applied.

    Raises ArgumentError: `unknown_override` with the nearest keys, `invalid_argument` for a bad value, or
    `lossy_precision` if bf16 would round the updates away; ResourceError `missing_package` for a precision whose
    library is not installed.
    """
    values = _merged(Recipe().model_dump(), preset_values(preset))
    valid = set(recipe_keys())
    for key in overrides:
        if key not in valid:
            raise ArgumentError(
                "unknown_override",
                "There is no such recipe key.",
                value=key,
                nearest=nearest(key, valid) or sorted(k for k in valid if k.split(".")[0] == key.split(".")[0]),
                fix="Use a dotted key such as 'distill.steps'; the resource opd://recipe-keys lists all of them.",
            )
    values = _with_changes(values, overrides)
    if (
        overrides.get("benchmark.grader", "auto") not in ("auto", "regex")
        and "benchmark.answer_pattern" not in overrides
    ):
        values["benchmark"]["answer_pattern"] = None  # the preset's pattern belongs to the preset's grader
    try:
        recipe = Recipe.model_validate({**values, "preset": preset})
    except ValidationError as error:
        raise invalid_recipe(error) from error
    for part, optimizer in (("sft.optimizer", recipe.sft.optimizer), ("distill.optimizer", recipe.distill.optimizer)):
        require_kept_updates(optimizer, part)
        require_package(optimizer, part)
    for name, training in (("sft", recipe.sft), ("distill", recipe.distill)):
        require_adapter_precision(training, name)
    require_divisible(recipe)
    return recipe


def invalid_recipe(error: ValidationError) -> ArgumentError:
    """What is wrong with a key's value and what it takes; or which keys do not fit together, as the message says."""
    first = error.errors(include_url=False, include_context=False)[0]
    valid, key = set(recipe_keys()), ".".join(str(part) for part in first["loc"])
    while key and key not in valid:  # a part of a value, or a branch of a choice
        key = key.rpartition(".")[0]
    if not key:
        message = first["msg"].removeprefix("Value error, ")
        fix = "Change one of the keys that this names; the resource opd://recipe-keys says what each means."
        return ArgumentError("invalid_argument", f"{message}.", fix=fix)
    allowed = allowed_text(key_schema(key))
    return ArgumentError(
        "invalid_argument",
        f"Override {key}: {first['msg'].removeprefix('Value error, ')}.",
        value=first.get("input"),
        fix=f"Set '{key}' to: {allowed}.",
    )


BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def key_schema(key: str) -> Mapping[str, Any]:
    """The JSON schema of one recipe key."""
    schema = Recipe.model_json_schema()
    found: Mapping[str, Any] = schema
    for name in key.split("."):
        section = next((part for part in found.get("anyOf", ()) if "$ref" in part), found)
        section = schema["$defs"][section["$ref"].rsplit("/", 1)[1]] if "$ref" in section else section
        found = section["properties"][name]
    return found


def allowed_text(leaf: Mapping[str, Any]) -> str:
    """What a key takes, by its schema: choices, or type and bounds."""
    if "anyOf" in leaf:
        return " or ".join(allowed_text(part) for part in leaf["anyOf"])
    if "$ref" in leaf:
        return "object"
    if "enum" in leaf:
        return ", ".join(leaf["enum"])
    if leaf.get("maxItems") is not None and leaf.get("minItems") == leaf["maxItems"]:
        return f"{leaf['type']} of {leaf['maxItems']}"
    return " ".join([leaf["type"], *(f"{sign} {leaf[name]}" for name, sign in BOUNDS.items() if name in leaf)])


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with valid values of dotted keys; raises pydantic's ValidationError for others."""
    return Recipe.model_validate(_with_changes(recipe.model_dump(), changes))


def _with_changes(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values with those of dotted keys."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        section = values
        *parents, name = key.split(".")
        for parent in parents:
            section[parent] = section[parent] if section.get(parent) is not None else {}
            section = section[parent]
        section[name] = value
    return values


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


LEAST_BF16_RATE = 1e-4
# Typical spread of language-model weights; with noisy gradients Adam moves them by half its learning rate.
USUAL_SPREAD, USUAL_MOVE = 0.02, 0.5
# A smaller relative change of a bf16 moment is rounded away.
LEAST_BF16_CHANGE = 2.0**-8


def lost_share(learning_rate: float, spread: float = USUAL_SPREAD) -> float:
    """The approximate share of updates that rounding to bf16 undoes, for normal weights of deviation `spread`.

    A weight in [2^e, 2^(e+1)) keeps its value unless it moves by 2^(e−8), half the distance to its neighbour.
    """
    least = 2.0 ** (math.floor(math.log2(USUAL_MOVE * learning_rate) + 8) + 1)
    return 1.0 - math.erf(least / (spread * math.sqrt(2.0)))


def require_kept_updates(recipe: OptimizerRecipe, section: str) -> None:
    """Raise ArgumentError `lossy_precision` for settings with which bf16 would round the updates away.

    `section` is the recipe's section, for the message.
    """
    if recipe.precision == "bf16" and recipe.learning_rate < LEAST_BF16_RATE:
        raise ArgumentError(
            "lossy_precision",
            f"Rounding to bf16 would undo about {lost_share(recipe.learning_rate):.0%} of the updates at learning rate "
            f"{recipe.learning_rate:g}: they are smaller than half the distance between two bf16 weights.",
            value=f"{section}.precision='bf16'",
            fix=f"Set '{section}.precision' to 'bf16_stochastic', 'split_master' or 'fp32_master', or the learning "
            f"rate to {LEAST_BF16_RATE:g} or more.",
        )
    if not keeps_float32(recipe.precision) and 1.0 - max(recipe.betas) < LEAST_BF16_CHANGE:
        raise ArgumentError(
            "lossy_precision",
            f"With bf16 moments a beta above {1.0 - LEAST_BF16_CHANGE:.4f} makes them stand still: a step changes them "
            "by less than half the distance between two bf16 numbers.",
            value=f"{section}.betas={recipe.betas}",
            fix=f"Lower '{section}.betas', or set '{section}.precision' to 'fp32_master'.",
        )


def require_adapter_precision(recipe: SftRecipe | DistillRecipe, section: str) -> None:
    """Raise ArgumentError `lossy_precision` for an adapter that would not be kept in float32."""
    if recipe.adapter is not None and recipe.optimizer.precision != "fp32_master":
        raise ArgumentError(
            "lossy_precision",
            "An adapter and its moments are kept in float32: they are small, and what is narrow is the frozen model.",
            value=f"{section}.optimizer.precision='{recipe.optimizer.precision}'",
            fix=f"Set '{section}.optimizer.precision' to 'fp32_master'; '{section}.adapter.base_dtype' says how the "
            "frozen weights are kept.",
        )


def require_divisible(recipe: Recipe) -> None:
    """Raise ArgumentError `devices_unsupported` for a training that several devices cannot share."""
    if isinstance(recipe.runtime.devices, int):
        require_even_replicas(recipe.runtime.replicas, recipe.runtime.devices)
    if recipe.runtime.devices == 1:
        return
    value, one = f"runtime.devices={recipe.runtime.devices}", "set 'runtime.devices' to 1."
    for name, section in (("sft", recipe.sft), ("distill", recipe.distill)):
        if section.optimizer.precision != "fp32_master":
            raise ArgumentError(
                "devices_unsupported",
                f"On several devices weights and moments are kept in float32, of which each holds its part; "
                f"'{name}.optimizer.precision' is '{section.optimizer.precision}'.",
                value=value,
                fix=f"Set '{name}.optimizer.precision' to 'fp32_master', or {one}",
            )
        if base_form(section.adapter) == "nf4":
            raise ArgumentError(
                "devices_unsupported",
                "Weights in 4 bits are not divided among devices: a base in 4 bits fits one.",
                value=value,
                fix=f"Leave out '{name}.adapter.quantization', or {one}",
            )
    if recipe.distill.method == "live" and recipe.rollout.engine not in (None, "auto"):
        raise ArgumentError(
            "devices_unsupported",
            "On several devices a live distillation draws its rollouts itself, each device its share; an engine is "
            f"given no student that is divided among them. 'rollout.engine' is '{recipe.rollout.engine}'.",
            value=value,
            fix=f"Leave out 'rollout.engine', or {one}",
        )


def require_even_replicas(replicas: Replicas, devices: int) -> None:
    """Raise ArgumentError `devices_unsupported` where so many replicas would not be held by equally many devices."""
    if replicas != "auto" and devices % replicas:
        raise ArgumentError(
            "devices_unsupported",
            f"{devices} device{'s' if devices > 1 else ''} cannot hold {replicas} replicas of the student with equally "
            "many devices each.",
            value=f"runtime.replicas={replicas}",
            fix="Set 'runtime.replicas' to a divisor of the number of devices, or to 'auto'.",
        )


def require_package(recipe: OptimizerRecipe, section: str) -> None:
    """Raise ResourceError `missing_package` where the precision needs torchao and it is not installed."""
    if recipe.precision == "fp32_master_8bit" and find_spec("torchao") is None:
        raise ResourceError(
            "missing_package",
            "8-bit moments need torchao, which is not installed here.",
            value=f"{section}.precision='fp32_master_8bit'",
            fix="Install the extra: pip install 'opd-mcp[int8]'; or set "
            f"'{section}.precision' to 'split_master', which needs no package.",
        )


# Rates that fit a student, by its parameters: the paper's at 4B (arXiv 2604.13010), the embedded task's (tuned on its
# tune.jsonl). Between the two nothing was measured, so only a factor of ten is called far.
SMALL_PARAMETERS = 50_000_000
USUAL_RATES = {"sft": 8e-5, "distill": 2e-6}
SMALL_RATES = {"sft": 4e-3, "distill": 3e-3}
# Such a rate first takes a student away from where it was, and needs steps to bring it nearer to its teacher: on the
# embedded task a student was worse than before after 50, 100 and 200 of them (docs/guide/settings.md).
SMALL_STEPS: Mapping[str, Any] = {
    "distill.steps": 400,
    "distill.optimizer.schedule": "linear",
    "distill.optimizer.warmup_steps": 10,
}
FEW_STEPS = 200
FAR_FACTOR = 10.0


@dataclass(frozen=True)
class ChosenPreset:
    """The preset for a student, what of it is changed for its size, and why."""

    preset: Preset
    overrides: Mapping[str, Any]
    why: str


def chosen_preset(parameters: int | None, *, untrained: bool) -> ChosenPreset:
    """The preset for a student by its size and state; `untrained`: its weights are as they were initialised."""
    if parameters is None:
        return ChosenPreset("quick", {}, "the student is still to be fetched: the rates of pretrained ones")
    size = f"{parameters / 1e6:.3g}M parameters"
    state = "never trained" if untrained else "trained before"
    if parameters < SMALL_PARAMETERS:
        rates = {f"{stage}.optimizer.learning_rate": rate for stage, rate in SMALL_RATES.items()}
        why = (
            f"a student of {size}, {state}: the higher rates of small ones, and the {SMALL_STEPS['distill.steps']} "
            "distill.steps that they take, as measured on the embedded task"
        )
        return ChosenPreset("quick", {**rates, **SMALL_STEPS}, why)
    return ChosenPreset("quick", {}, f"a student of {size}, {state}: the paper's rates, for pretrained ones")


# How the message of a rate begins that is below, not above, what fits.
TOO_LOW = "is too low: "


@dataclass(frozen=True)
class FarRate:
    """A rate that does not fit the student: `preset_rates` where the preset sets it, else `learning_rate_far`."""

    code: Literal["learning_rate_far", "preset_rates"]
    key: str
    message: str
    fix: str
    rate: float
    fitting: float
    changes: Mapping[str, Any]
    """The keys to set, with the steps that such a rate takes."""

    @property
    def too_low(self) -> bool:
        """Whether it is below what fits."""
        return self.rate < self.fitting


def far_rates(recipe: Recipe, stages: Iterable[str], parameters: int | None) -> list[FarRate]:
    """The learning rates of these stages that are ten times above or below those of such a student.

    An adapter's may be ten times higher still, as is usual for LoRA. Without `parameters` the preset's count.
    """
    presets = resolve_recipe(recipe.preset, {})
    found = []
    for stage in stages:
        section: SftRecipe | DistillRecipe = getattr(recipe, stage)
        rate, preset = section.optimizer.learning_rate, getattr(presets, stage).optimizer.learning_rate
        small = parameters is not None and parameters < SMALL_PARAMETERS
        fitting = (SMALL_RATES if small else USUAL_RATES)[stage] if parameters is not None else preset
        if not _is_far(rate, fitting, section):
            continue
        key = f"{stage}.optimizer.learning_rate"
        code: Literal["learning_rate_far", "preset_rates"] = "preset_rates" if rate == preset else "learning_rate_far"
        whose = f", as preset '{recipe.preset}' has it," if rate == preset else ""
        size = None if parameters is None else f"{parameters / 1e6:.3g}M"
        than = f"the preset's {preset:g}" if size is None else f"the {fitting:g} at which a student of {size} learns"
        verb = TOO_LOW if rate < fitting else "is too high: "
        message = f"'{key}'{whose} {verb}{rate:g}, {_times(rate / fitting)} {than}."
        changes, fix = {key: fitting}, f"Set '{key}' to about {fitting:g}."
        if stage == "distill" and small and recipe.distill.steps <= FEW_STEPS:
            changes |= SMALL_STEPS
            fix = f"{fix[:-1]}, and 'distill.steps' to {SMALL_STEPS['distill.steps']}."
        found.append(FarRate(code, key, message, fix, rate, fitting, changes))
    return found


@dataclass(frozen=True)
class FewSteps:
    """Too few steps at the rate of a small student, and what to set instead."""

    message: str
    fix: str
    changes: Mapping[str, Any]
    code: str = "few_steps"


def few_steps(recipe: Recipe, parameters: int | None) -> FewSteps | None:
    """Whether a distillation is too short for the rate of a small student; None where that was not measured."""
    section, fitting = recipe.distill, SMALL_RATES["distill"]
    small = parameters is not None and parameters < SMALL_PARAMETERS
    measured = section.method == "lightning" and section.estimator == "sampled"
    rate = section.optimizer.learning_rate
    if not small or not measured or section.steps > FEW_STEPS or _is_far(rate, fitting, section):
        return None
    steps = SMALL_STEPS["distill.steps"]
    return FewSteps(
        f"'distill.steps' is {section.steps}, at a rate of {rate:g}: on the embedded task a small student was worse "
        f"than before after {FEW_STEPS} steps at {fitting:g}, and better after {steps}.",
        f"Set 'distill.steps' to {steps} and 'distill.optimizer.schedule' to 'linear'.",
        SMALL_STEPS,
    )


def _is_far(rate: float, other: float, section: SftRecipe | DistillRecipe) -> bool:
    highest = FAR_FACTOR * (FAR_FACTOR if section.adapter is not None else 1.0)
    # A tenth, which a collapse asks for, is not yet too low.
    return rate >= other * highest * (1 - 1e-9) or rate < other / FAR_FACTOR * (1 - 1e-9)


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g} of"
