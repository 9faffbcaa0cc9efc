"""Suites by name: what they are turned into, what is refused with the way out, and what the caller may still say."""

import json
from pathlib import Path
from typing import get_args

import pytest

from opd_mcp.planning import suites as module
from opd_mcp.planning.suites import suite_changes, suite_name, suites, with_suite
from opd_mcp.schemas.errors import ArgumentError, DataError, ResourceError
from opd_mcp.schemas.recipes import Preset
from opd_mcp.schemas.requests import BenchmarkStudent
from opd_mcp.schemas.resolve import resolve_recipe

USABLE = [name for name, suite in suites().items() if suite.refused is None]
ALLOWED = {"benchmark.allow_code": True}
SHORT = {"benchmark.sampling.max_new_tokens": 64}  # the world's models have 256 positions


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("name", USABLE)
def test_every_suite_resolves_in_every_preset(name, preset):
    recipe = resolve_recipe(preset, suites()[name].settings() | ALLOWED).benchmark
    assert recipe.grader != "auto"
    assert recipe.prompt_template.count("{prompt}") == 1
    assert recipe.answer_pattern is None, "the demo's pattern is for its own task"
    assert recipe.sampling.max_new_tokens >= 2048


@pytest.mark.parametrize(
    ("given", "name"),
    [("GSM8K", "gsm8k"), ("MATH-500", "math500"), ("aime_2024", "aime24"), ("AIME25", "aime25"), ("HMMT", "hmmt25")],
)
def test_names_as_people_write_them(given, name):
    assert suite_name(given) == name


def test_what_cannot_be_run_is_refused_with_the_way_out(monkeypatch):
    with pytest.raises(ArgumentError, match=r"instruction checkers.*suite='lm_eval:ifeval'"):
        suite_name("IFEval")
    with pytest.raises(ArgumentError, match=r"known are gsm8k, math500") as unknown:
        suite_name("gsm9k")
    assert unknown.value.nearest[0] == "gsm8k"
    with pytest.raises(ArgumentError, match="task files are programs"):
        suite_name("lm_eval:/data/task.yaml")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"missing_package.*opd-mcp\[eval\]"):
        suite_name("lm_eval:arc_easy")


def test_a_call_needs_prompts_or_a_suite_that_has_some():
    with pytest.raises(ArgumentError, match="Neither prompts nor a suite"):
        with_suite(BenchmarkStudent(model="/m"))
    with pytest.raises(ArgumentError, match=r"pickled tests.*question_content, public_test_cases"):
        with_suite(BenchmarkStudent(model="/m", suite="livecodebench"))
    with pytest.raises(ArgumentError, match="brings its own prompts"):
        with_suite(BenchmarkStudent(model="/m", suite="lm_eval:arc_easy", prompts="/p.jsonl"))


@pytest.fixture(autouse=True)
def harness_is_here(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object())


def test_a_suite_from_the_hub_is_fetched_by_the_run_and_its_settings_are_in_the_recipe(service, world):
    arguments = BenchmarkStudent(model=world.student, suite="aime25", preset="demo")
    with pytest.raises(DataError, match=r"too_long.*256 positions.*'benchmark.sampling.max_new_tokens' to at most 256"):
        service._builder.benchmark(arguments)
    request = service._builder.benchmark(arguments.model_copy(update={"overrides": SHORT}))
    assert [phase.name for phase in request.phases] == ["fetch", "benchmark"]
    assert request.inputs.suite == "aime25"
    assert request.inputs.prompts.hub_id == "math-ai/aime25@test"
    assert request.inputs.prompts.columns == {"prompt": "problem", "answer": "answer"}
    recipe = request.recipe.benchmark
    assert (recipe.samples_per_prompt, recipe.grader, recipe.sampling.temperature) == (32, "number", 0.6)


def test_a_suite_from_a_folder_and_what_the_caller_says_outranks_it(service, world):
    row = {"question": "1+1=?", "answer": "It is 2.\n#### 2"}
    file = world.file("gsm8k.jsonl", json.dumps(row) + "\n")
    arguments = BenchmarkStudent(
        model=world.student,
        suite="gsm8k",
        prompts=file,
        samples_per_prompt=3,
        overrides={"benchmark.sampling.max_new_tokens": 99, "benchmark.prompt_template": "Q: {prompt}"},
    )
    request = service._builder.benchmark(arguments)
    assert [phase.name for phase in request.phases] == ["benchmark"]
    assert request.inputs.prompts.rows_with_answer == 1
    recipe = request.recipe.benchmark
    assert (recipe.samples_per_prompt, recipe.sampling.max_new_tokens) == (3, 99)
    assert (recipe.prompt_template, recipe.grader) == ("Q: {prompt}", "gsm8k")


def test_generated_programs_run_only_where_that_is_allowed(service, world):
    tests = json.dumps([{"input": "3\n", "output": "4", "testtype": "stdin"}])
    file = world.file("code.jsonl", json.dumps({"question_content": "Add 1.", "public_test_cases": tests}) + "\n")
    arguments = BenchmarkStudent(model=world.student, suite="livecodebench", prompts=file)
    with pytest.raises(ArgumentError, match=r"benchmark\.allow_code must be true"):
        service._builder.benchmark(arguments)
    allowed = service._builder.benchmark(arguments.model_copy(update={"overrides": ALLOWED | SHORT}))
    assert allowed.recipe.benchmark.grader == "code"


def test_a_task_of_lm_eval_has_no_prompts_and_a_key_of_its_own(service, world):
    task, other = (
        service._builder.benchmark(BenchmarkStudent(model=world.student, suite=f"lm_eval:{name}")).phases
        for name in ("arc_easy", "arc_challenge")
    )
    assert [phase.name for phase in task] == ["benchmark"]
    assert task[0].key != other[0].key


@pytest.mark.parametrize("name", suites())
def test_the_document_says_what_each_suite_is(name):
    document = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    [row] = [line for line in document.splitlines() if line.startswith("|") and f'suite="{name}"' in line]
    suite = suites()[name]
    if suite.refused is not None:
        assert f'suite="{suite.instead}"' in row
        return
    section = suite.benchmark
    assert f"`{section['grader']}`" in row
    assert f"{section['sampling']['max_new_tokens']:,}" in row
    assert f"| {section['samples_per_prompt'] or 'greedy'} |" in row
    assert suite.data is None or f"`{suite.data}`" in row


def test_what_a_run_changed_of_its_suite_is_told_with_the_published_value():
    _, name, settings = with_suite(BenchmarkStudent(model="m", suite="gsm8k"))
    assert suite_changes(name, resolve_recipe("demo", settings)) == {}
    changed = settings | {"benchmark.sampling.max_new_tokens": 64}
    assert suite_changes(name, resolve_recipe("quick", changed)) == {"benchmark.sampling.max_new_tokens": [2048, 64]}
    assert (
        suite_changes(None, resolve_recipe("quick", {}))
        == suite_changes("lm_eval:arc", resolve_recipe("quick", {}))
        == {}
    )
