"""Whether a journal record's data is what its type says, so that whoever folds records needs no doubt."""

from collections.abc import Callable
from datetime import datetime
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from opd_mcp.schemas.reports import StageCost
from opd_mcp.schemas.runs import Failure, PhaseName, RunState

STATES = frozenset(get_args(RunState))
PHASES = frozenset(get_args(PhaseName))
EVENTS = frozenset({"started", "finished", "reused", "resumed"})


def is_time(text: Any) -> bool:
    """Whether a text is a time in the journal's form, its zone included."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_count(value: Any) -> bool:
    """Whether a value is a whole number that any file may hold."""
    return type(value) is int and -(1 << 53) < value < 1 << 53


def fits(type: str, data: Any) -> bool:
    """Whether the data has the fields that a record of this type has; more of them are no harm."""
    check = _CHECKS.get(type)
    return check is not None and isinstance(data, dict) and check(data)


def _state(data: dict[str, Any]) -> bool:
    return _text(data.get("state")) and data["state"] in STATES


def _phase(data: dict[str, Any]) -> bool:
    name, event = data.get("phase"), data.get("event")
    named = _text(name) and _text(event) and name in PHASES and event in EVENTS
    placed = event != "resumed" or is_count(data.get("step"))
    return named and placed and _text(data.get("artifact_id", "")) and _is(StageCost, data.get("cost"))


def _progress(data: dict[str, Any]) -> bool:
    return is_count(data.get("done")) and is_count(data.get("total")) and _text(data.get("unit"))


def _metric(data: dict[str, Any]) -> bool:
    values = data.get("values")
    return is_count(data.get("step")) and isinstance(values, dict) and all(map(_number, values.values()))


def _alert(data: dict[str, Any]) -> bool:
    return _text(data.get("code")) and _text(data.get("message"))


def _number(value: Any) -> bool:
    return value is None or type(value) is float or is_count(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _is(schema: type[BaseModel], value: Any) -> bool:
    try:
        return value is None or bool(schema.model_validate(value))
    except ValidationError:
        return False


_CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "state": _state,
    "phase": _phase,
    "progress": _progress,
    "metric": _metric,
    "alert": _alert,
    "result": lambda data: True,
    "error": lambda data: _is(Failure, data),
}
