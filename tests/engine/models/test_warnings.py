"""What makes a model slower than it could be is told, in the worker's alerts and to the report."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.engine.models.loading import load_model, model_warnings
from opd_mcp.engine.runtime import Runtime


@pytest.fixture
def alerts() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def context(alerts: list[tuple[str, str]]) -> Context:
    class Listening(SilentReporter):
        def alert(self, code: str, message: str) -> None:
            alerts.append((code, message))

    return Context(reporter=Listening())


def test_a_model_at_its_best_is_not_spoken_of(example: Path, runtime: Runtime, context: Context, alerts) -> None:
    assert model_warnings(context, load_model(example / "student", runtime), None) == []
    assert alerts == []


def test_layers_that_could_not_be_compiled_are_told_once(
    example: Path, runtime: Runtime, context: Context, alerts: list[tuple[str, str]]
) -> None:
    loaded = replace(load_model(example / "student", runtime), plain_layers="no compiler here")
    (message,) = model_warnings(context, loaded, loaded)
    assert message == "The decoder layers run in plain torch, more slowly: no compiler here."
    assert alerts == [("plain_layers", message)]
