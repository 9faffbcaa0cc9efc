"""Prompts of reasoning-gym's tasks: what a reference may say, which rows it means, what plan and report make of it."""

import json
from pathlib import Path

import pytest

from opd_mcp.planning.prompts import task_prompts as module
from opd_mcp.planning.prompts.task_prompts import TaskPrompts, task_prompts, write_task_prompts
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.requests import BenchmarkStudent

CHAIN_SUM = "reasoning_gym:chain_sum?size=20&seed={}&min_terms=4&max_digits=1"
needs_package = pytest.mark.needs("reasoning_gym")


def rows_of(task: TaskPrompts, folder: Path) -> list[dict[str, str]]:
    folder.mkdir(exist_ok=True)
    write_task_prompts(task, folder / "prompts.jsonl")
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_reference_names_task_size_seed_and_parameters_in_any_order():
    wanted = TaskPrompts("chain_sum", 2000, 1, (("max_terms", "3"), ("min_terms", "2")))
    assert task_prompts("reasoning_gym:chain_sum?size=2000&seed=1&min_terms=2&max_terms=3") == wanted
    assert task_prompts("reasoning-gym:chain_sum?max_terms=3&min_terms=2&seed=1&size=2000") == wanted
    assert task_prompts("reasoning_gym:gcd") == task_prompts("reasoning_gym:gcd?size=500&seed=0")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?size=0", "size is a whole number from 1 to 100000"),
        ("?size=100001", "size is a whole number"),
        ("?size=1e3", "size is a whole number"),
        ("?seed=-1", "seed is a whole number from 0 to 42000"),
        ("?seed", "names no task"),
        ("?seed=1&seed=2", "names no task"),
        ("?=1", "names no task"),
        ("/../x", "names no task"),
        ("?seed=1&", "names no task"),
    ],
)
def test_what_a_reference_cannot_say_is_refused_before_any_process_starts(query, message):
    with pytest.raises(ArgumentError, match=message):
        task_prompts(f"reasoning_gym:chain_sum{query}")


def test_without_the_package_the_error_names_the_extra(service, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"missing_package.*pip install 'opd-mcp\[tasks\]'"):
        service._references.prompts(CHAIN_SUM.format(1))


@needs_package
def test_rows_are_the_tasks_own_and_the_same_in_every_process(tmp_path):
    import reasoning_gym

    task = task_prompts(CHAIN_SUM.format(3))
    rows = rows_of(task, tmp_path / "one")
    assert rows == rows_of(task, tmp_path / "other")
    theirs = reasoning_gym.create_dataset("chain_sum", size=20, seed=300_000, min_terms=4, max_digits=1)
    assert [row["prompt"] for row in rows] == [entry["question"] for entry in theirs]
    assert [row["id"] for row in rows] == [f"chain_sum-3-{number}" for number in range(20)]
    made_from = json.loads((tmp_path / "one" / "task.json").read_text())
    assert (made_from["task"], made_from["seed"], made_from["size"]) == ("chain_sum", 3, 20)


@needs_package
@pytest.mark.parametrize("task", ["chain_sum", "graph_color", "group_anagrams", "figlet_font", "knights_knaves"])
def test_the_tasks_own_scorer_knows_the_answer_from_the_file(task, tmp_path):
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(task)
    for row in rows_of(TaskPrompts(task, size=4), tmp_path):
        entry = json.loads(row["answer"])
        assert entry["metadata"]["source_dataset"] == task
        assert entry["answer"] is None or score(entry["answer"], entry) == 1
        assert score("surely not this", entry) < 1


@needs_package
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("reasoning_gym:chain_sums", r"no task 'chain_sums'.*Nearest: chain_sum"),
        ("reasoning_gym:composite", "no task 'composite'"),
        ("reasoning_gym:chain_sum?min_term=3", r"no parameter 'min_term'.*Nearest: min_terms.*parameters of chain_sum"),
        ("reasoning_gym:chain_sum?min_terms=few", r"min_terms is a whole number.*min_terms=2"),
        ("reasoning_gym:chain_sum?allow_negation=1", r"allow_negation is true or false"),
        ("reasoning_gym:chain_sum?min_terms=7&max_terms=3", r"refuses these parameters: max_terms must be"),
        ("reasoning_gym:arc_agi?size=3", "answers of arc_agi cannot be graded from a file"),
    ],
)
def test_a_wrong_task_or_parameter_is_refused_with_the_nearest_and_nothing_is_kept(reference, message, service):
    with pytest.raises(ArgumentError, match=message):
        service._references.prompts(reference)
    assert not list(service.store.workspace.artifacts_of("prompts").iterdir())


@needs_package
def test_rows_that_take_too_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WALL_SECONDS", 0.05)  # less than importing the package takes
    with pytest.raises(ArgumentError, match="too_slow"):
        write_task_prompts(task_prompts(CHAIN_SUM.format(1)), tmp_path / "prompts.jsonl")


@needs_package
def test_a_plan_knows_the_rows_and_two_seeds_share_none(service, world):
    arguments = world.plan_arguments(prompts=CHAIN_SUM.format(1), eval_prompts=CHAIN_SUM.format(2))
    plan = service.plan(arguments)
    prompts = plan.inputs.prompts
    assert (prompts.rows, prompts.rows_with_answer, prompts.reference) == (20, 20, CHAIN_SUM.format(1))
    assert prompts.artifact_id.startswith("prompts-")
    assert (plan.hygiene.eval_overlap_exact, plan.hygiene.eval_overlap_normalised) == (0, 0)
    again = service.plan(arguments)
    assert (again.plan_id, again.inputs.prompts.sha256) == (plan.plan_id, prompts.sha256)
    assert len(service.store.artifacts.list(kind="prompts")) == 2


@needs_package
def test_the_same_seed_for_training_and_evaluation_is_found(service, world):
    plan = service.plan(world.plan_arguments(prompts=CHAIN_SUM.format(1), eval_prompts=CHAIN_SUM.format(1)))
    assert "20 of 20 eval prompts are also training prompts" in next(
        finding.message for finding in plan.warnings if finding.code == "eval_overlap"
    )


@needs_package
def test_a_benchmark_grades_with_the_tasks_own_scorer(real_service, world, finished):
    arguments = BenchmarkStudent(
        model=str(Path(world.teacher).parents[1] / "chain_sum" / "teacher"),
        prompts="reasoning_gym:chain_sum?size=24&seed=9&min_terms=3&max_terms=6&max_digits=1",
        preset="quick",
        overrides={"benchmark.samples_per_prompt": 0, "benchmark.sampling.max_new_tokens": 64},
    )
    status = finished(real_service, real_service.benchmark_student(arguments).run_id)
    assert status.state == "succeeded", status
    report = json.loads((Path(status.result["paths"]["report"]) / "report.json").read_text(encoding="utf-8"))
    assert (report["grader"], report["prompts_with_answer"]) == ("reasoning_gym", 24)
    assert report["models"][0]["greedy_accuracy"]["value"] >= 0.75
