"""Remedies: the recipe keys to change after a bad result, with their new values, by the codes of its causes.

A verdict says in words what these are in numbers; the next call of a run carries them. The deepest cause comes alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_mcp.grading.verdicts import RATES
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.reports import Verdict
from opd_mcp.schemas.resolve import far_rates, few_steps

LOWER, MUCH_LOWER, MORE = 3.0, 10.0, 4


def remedy(verdict: Verdict, recipe: Recipe, stages: Sequence[str], parameters: int | None) -> dict[str, Any]:
    """What to change of the recipe that led to a verdict: that of its deepest cause; nothing after a gain.

    `stages` are the trainings that the run did, in their order; `parameters` are the student's. Verdicts of earlier
    versions name no causes: there the rates that do not fit are changed, as their alerts said.
    """
    if verdict.judgement == "better" or not stages:
        return {}
    for code in RATES if verdict.causes is None else verdict.causes:
        if code in RATES and (far := far_rates(recipe, stages, parameters)):
            return _changed(recipe, {key: value for rate in far for key, value in rate.changes.items()})
        if code == "few_steps" and (few := few_steps(recipe, parameters)):
            return _changed(recipe, few.changes)
        if code in CHANGES:
            return CHANGES[code](recipe, stages[-1])
    return _lower_rate(recipe, stages[-1]) if verdict.judgement == "worse" else _times(recipe, f"{stages[-1]}.steps", 2)


def changes_text(changes: Mapping[str, Any], recipe: Recipe) -> str:
    """The changes as a sentence, e.g. `The call changes 'distill.steps' from 50 to 200.`; empty without any."""
    parts = [f"'{key}' from {_text(_value(recipe, key))} to {_text(value)}" for key, value in changes.items()]
    return f"The call changes {' and '.join(parts)}." if parts else ""


def _changed(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if _value(recipe, key) != value}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _lower_rate(recipe: Recipe, stage: str, factor: float = LOWER) -> dict[str, Any]:
    key = f"{stage}.optimizer.learning_rate"
    return {key: float(f"{_value(recipe, key) / factor:.2g}")}


def _times(recipe: Recipe, key: str, factor: float) -> dict[str, Any]:
    return {key: max(1, int(_value(recipe, key) * factor))}


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


CHANGES: Mapping[str, Callable[[Recipe, str], dict[str, Any]]] = {
    "sft_undertrained": lambda recipe, _: _times(recipe, "sft.steps", MORE),
    "step_skipped": _lower_rate,
    "rollouts_stale": lambda recipe, _: _times(recipe, "distill.steps", 0.5),
    "collapse": lambda recipe, stage: _lower_rate(recipe, stage, MUCH_LOWER),
    "no_learning": lambda recipe, _: _times(recipe, "distill.steps", MORE),
    "answers_truncated": lambda recipe, _: _times(recipe, "benchmark.sampling.max_new_tokens", 2),
}
