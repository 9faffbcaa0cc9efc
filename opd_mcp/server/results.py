"""A finished run's result as a few lines: where things are, and the evidence; unknown parts as compact JSON."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from opd_mcp.server.answers import known

_MAX_CHARACTERS = 3000


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Paths, scores with their 95 % intervals, differences, training steps and seconds a stage, then the rest."""
    result = known(dict(result))
    lines = [*_path_lines(result), *_score_lines(result), *_comparison_lines(result), *_training_lines(result)]
    if costs := _items(result, "costs"):
        spent = ", ".join(
            f"{cost.get('stage')} reused"
            if cost.get("reused")
            else f"{cost.get('stage')} {_figure(cost.get('seconds'))}"
            for cost in costs
        )
        lines.append(f"seconds by stage: {spent}")
    shown = {"artifacts", "paths", "scores", "comparisons", "training", "costs"}
    if rest := {name: value for name, value in result.items() if name not in shown}:
        lines.append(compact(rest))
    return lines


def compact(value: Any) -> str:
    """The value as JSON without nulls or spaces, cut at 3000 characters with a word on where the rest is."""
    text = json.dumps(known(value), ensure_ascii=False, separators=(",", ":"), default=str)
    if len(text) <= _MAX_CHARACTERS:
        return text
    return text[:_MAX_CHARACTERS] + "… (cut; the structured answer has all of it)"


def _path_lines(result: Mapping[str, Any]) -> Iterator[str]:
    paths, artifacts = _mapping(result, "paths"), _mapping(result, "artifacts")
    for name, path in paths.items():
        # An artifact's directory is named after it.
        yield f"{name}: {path}"
    for name in artifacts.keys() - paths.keys():
        yield f"{name}: {artifacts[name]}"


def _score_lines(result: Mapping[str, Any]) -> Iterator[str]:
    scores = _mapping(result, "scores")
    for model in scores:
        figures = _mapping(scores, model)
        yield f"score of {model}: " + ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())


def _comparison_lines(result: Mapping[str, Any]) -> Iterator[str]:
    for pair in _items(result, "comparisons"):
        difference = _figure(pair.get("accuracy_difference"))
        yield f"accuracy of {pair.get('candidate')} minus {pair.get('baseline')}: {difference}"


def _training_lines(result: Mapping[str, Any]) -> Iterator[str]:
    for stage, summary in _mapping(result, "training").items():
        if not isinstance(summary, Mapping):
            continue
        final = ", ".join(f"{name} {_figure(value)}" for name, value in _mapping(summary, "final").items())
        pace = _figure(summary.get("seconds_per_step"))
        yield f"{stage}: {summary.get('steps')} steps of {pace} s; at the end {final}"


def _figure(value: Any) -> str:
    """A number with four digits; [value, low, high] as a value with its interval."""
    if isinstance(value, list) and len(value) == 3:
        return f"{_figure(value[0])} [{_figure(value[1])}, {_figure(value[2])}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_figure(part)}" for name, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _items(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = record.get(name)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
