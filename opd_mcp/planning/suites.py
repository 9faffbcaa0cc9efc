"""The suites that `benchmark_student` knows by name, read from `suites.toml`, and tasks of lm-eval.

A suite is data, prompt, grader and sampling as published; it is applied as recipe keys, so that a report of it holds
all of them.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from pydantic import Field

from opd_mcp.planning.references import columns_of
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import ArgumentError, ResourceError, nearest
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.requests import BenchmarkStudent
from opd_mcp.schemas.resolve import dotted, recipe_keys
from opd_mcp.schemas.runs import LM_EVAL

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Suite(Schema):
    """One table of `suites.toml`."""

    title: str
    data: str | None = None
    no_data: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    benchmark: dict[str, Any] = Field(default_factory=dict)
    refused: str | None = None
    instead: str | None = None

    def settings(self) -> dict[str, Any]:
        """Its recipe keys; a preset's own way to grade does not count."""
        values = {f"benchmark.{key}": value for key, value in self.benchmark.items() if key != "sampling"}
        sampling = {f"benchmark.sampling.{key}": value for key, value in self.benchmark.get("sampling", {}).items()}
        return {"benchmark.answer_pattern": None, **values, **sampling}


@cache
def suites() -> Mapping[str, Suite]:
    """Every suite by name."""
    tables = tomllib.loads((files("opd_mcp.planning") / "suites.toml").read_text(encoding="utf-8"))
    return {name: Suite.model_validate(table) for name, table in tables.items()}


def suite_name(given: str) -> str:
    """A suite's name as it stands in the table: `MATH-500` is `math500`, `aime_2024` is `aime24`.

    Raises ArgumentError `invalid_argument` for an unknown suite, or one that is refused with the way out;
    ResourceError `missing_package` for a task of lm-eval where that is not installed.
    """
    if given.startswith(LM_EVAL):
        return _task(given)
    name = re.sub(r"20(\d\d)$", r"\1", re.sub(r"[^a-z0-9]", "", given.lower()))
    name = {"hmmt": "hmmt25", "math": "math500"}.get(name, name)
    suite = suites().get(name)
    if suite is None:
        known = [known for known, suite in suites().items() if suite.refused is None]
        raise ArgumentError(
            "invalid_argument",
            f"There is no suite of that name; known are {', '.join(known)}.",
            value=given,
            nearest=nearest(name, known),
            fix="Name one of them, a task of lm-eval as 'lm_eval:TASK', or give prompts with answers instead.",
        )
    if suite.refused is not None:
        raise ArgumentError("invalid_argument", f"{suite.refused}.", value=given, fix=f"Use suite='{suite.instead}'.")
    return name


def _task(given: str) -> str:
    if TASK_NAME.fullmatch(given.removeprefix(LM_EVAL)) is None:
        raise ArgumentError(
            "invalid_argument",
            "This names no task of lm-eval: a task is given by the name that lm-eval lists, never as a file, since "
            "task files are programs.",
            value=given,
            fix="Give e.g. suite='lm_eval:arc_easy'; `lm-eval ls tasks` lists the names.",
        )
    if find_spec("lm_eval") is None:
        raise ResourceError(
            "missing_package",
            "Tasks of lm-eval need the package lm-eval, which is not installed here.",
            value=given,
            fix="Run: pip install 'opd-mcp[eval]'. Or use a suite by name, or prompts with answers.",
        )
    return given


def with_suite(arguments: BenchmarkStudent) -> tuple[BenchmarkStudent, str | None, dict[str, Any]]:
    """The arguments with the suite's data and columns, the suite's name, and its recipe keys.

    Raises ArgumentError `invalid_argument` for neither suite nor prompts, prompts next to a task of lm-eval, or a suite
    whose data must be given; and as `suite_name`.
    """
    if arguments.suite is None:
        if arguments.prompts is None:
            raise ArgumentError(
                "invalid_argument", "Neither prompts nor a suite is given.", fix="Give prompts=…, or suite='gsm8k'."
            )
        return arguments, None, {}
    name = suite_name(arguments.suite)
    if name.startswith(LM_EVAL):
        if arguments.prompts is not None:
            raise ArgumentError(
                "invalid_argument",
                "A task of lm-eval brings its own prompts.",
                value=arguments.prompts if isinstance(arguments.prompts, str) else "inline",
                fix="Leave out prompts, or leave out suite.",
            )
        return arguments, name, {}
    suite = suites()[name]
    prompts = arguments.prompts or suite.data
    if prompts is None:
        raise ArgumentError(
            "invalid_argument",
            f"The suite '{name}' needs prompts: {suite.no_data}.",
            value=arguments.suite,
            fix="Give prompts=… as a file or folder with the fields "
            f"{', '.join(suite.columns.values())}, or others named by columns=….",
        )
    columns = columns_of(arguments.columns, "prompts") or suite.columns
    return arguments.model_copy(update={"prompts": prompts, "columns": columns}), name, suite.settings()


def suite_changes(name: str | None, recipe: Recipe) -> dict[str, list[Any]]:
    """The settings of a run that differ from its suite's, as [published, used]; none without a suite of the table."""
    suite = suites().get(name or "")
    if suite is None:
        return {}
    used = dict(dotted(recipe.model_dump(mode="json"), set(recipe_keys())))
    return {key: [value, used[key]] for key, value in suite.settings().items() if used[key] != value}
