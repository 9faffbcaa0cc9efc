"""A sweep: its runs from one cache, found again by the same call, compared and stopped as one."""

import pytest

from opd_mcp.schemas.errors import ArgumentError, ResourceError, RunError
from opd_mcp.schemas.requests import CompareRuns, Sweep
from opd_mcp.schemas.runs import ACTIVE_STATES
from opd_mcp.server.render.monitoring import comparison_text
from opd_mcp.server.render.runs import sweep_text
from opd_mcp.supervisor.sweeps import swept_settings

GRID = {"distill.steps": [2, 3], "runtime.seed": [0, 1]}
TWO = {"distill.steps": [2, 3]}


@pytest.fixture
def cache_run(world, service, finished):
    """The id of a finished distillation, whose cache is swept over."""
    arguments = world.start_arguments(sft_prompts=world.prompts("sft"), eval_prompts=world.prompts("eval"))
    status = finished(service, service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status
    return status.run_id


def sweep(cache_run, **changes):
    return Sweep(**{"cache_id": cache_run, "grid": GRID, "preset": "demo", "name": "rates", "tags": ["mine"]} | changes)


def test_a_grid_is_every_combination_and_a_list_is_taken_as_it_is():
    assert swept_settings(sweep("c")) == [
        {"distill.steps": 2, "runtime.seed": 0},
        {"distill.steps": 2, "runtime.seed": 1},
        {"distill.steps": 3, "runtime.seed": 0},
        {"distill.steps": 3, "runtime.seed": 1},
    ]
    points = [{"distill.steps": 5}, {}, {"distill.steps": 5}]
    assert swept_settings(sweep("c", grid={}, points=points)) == points[:2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {}}, "a grid, or a list"),
        ({"points": [{"distill.steps": 1}]}, "a grid, or a list"),
        ({"grid": {"distill.steps": list(range(1, 9)), "runtime.seed": list(range(5))}}, "at most 32"),
        ({"overrides": {"distill.steps": 9}}, "swept and set"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(changes, said):
    with pytest.raises(ArgumentError, match=said):
        swept_settings(sweep("c", **changes))


def test_a_sweep_without_a_preset_trains_at_the_rates_of_the_student_s_size(service, cache_run, busy_machine):
    points = [{"distill.steps": 2}, {"distill.steps": 2, "distill.optimizer.learning_rate": 1e-3}]
    given = {
        name: value for name, value in sweep(cache_run, grid={}, points=points).to_dict().items() if name != "preset"
    }
    started = service.sweep(Sweep(**given))
    recipes = [service.store.record(run.run_id).request.recipe for run in started.runs]
    assert [recipe.preset for recipe in recipes] == ["quick"] * 2
    assert [recipe.distill.optimizer.learning_rate for recipe in recipes] == [3e-3, 1e-3], "a point's own counts"


def test_a_sweep_is_found_again_and_compared_and_all_of_its_runs_have_its_tag(world, service, cache_run, finished):
    before = service.list_runs().total
    with pytest.raises(ArgumentError, match=r"the same run.*sft\.steps.*distill\.steps"):
        service.sweep(sweep(cache_run, grid={"sft.steps": [5, 10]}))
    started = service.sweep(sweep(cache_run, grid=TWO))
    assert [run.settings for run in started.runs] == swept_settings(sweep(cache_run, grid=TWO))
    assert [run.reused for run in started.runs] == [False] * 2
    assert [run.name for run in started.runs] == ["rates: steps=2", "rates: steps=3"]
    assert all(run.run_id in sweep_text(started) for run in started.runs)
    for run in started.runs:
        assert finished(service, run.run_id).state == "succeeded"
    again = service.sweep(sweep(cache_run, grid=TWO, name="another name"))
    assert again.sweep_id == started.sweep_id
    assert [run.run_id for run in again.runs] == [run.run_id for run in started.runs]
    assert all(run.reused for run in again.runs)
    assert again.expected_seconds is None
    assert service.list_runs().total == before + 2
    assert service.list_runs(tag=started.sweep_id).total == service.list_runs(tag="mine").total == 2
    assert (again.next_action.tool, again.next_action.arguments) == ("compare_runs", {"tag": started.sweep_id})
    table = service.compare_runs(CompareRuns(tag=started.sweep_id))
    assert [run.run_id for run in table.runs] == [run.run_id for run in started.runs]
    assert table.settings == ["distill.steps"]
    assert [run.settings for run in table.runs] == [run.settings for run in started.runs]
    assert all(run.accuracy == (0.5, 0.4, 0.6) for run in table.runs)
    assert all(run.name in comparison_text(table) for run in table.runs)


def test_a_sweep_is_asked_about_and_cancelled_as_one_and_the_same_call_starts_what_is_missing(
    service, cache_run, busy_machine, finished
):
    both = sweep(cache_run, grid=TWO)
    question = service.sweep_question(both, 0.0)
    assert "2 runs" in question.text
    assert service.sweep_question(both, 1000.0) is None
    settings = service.workspace.root / "settings.toml"
    settings.write_text("[quotas]\nmax_running_runs = 1\n")
    part = service.sweep(both)
    assert question.confirm == part.sweep_id
    assert len(part.runs) == 1
    assert "quota_exceeded" in part.not_started[0]
    with pytest.raises(ResourceError, match="quota_exceeded"):
        service.sweep(sweep(cache_run, grid={"distill.steps": [7]}))
    settings.unlink()
    started = service.sweep(both)
    assert [run.reused for run in started.runs] == [True, False]
    assert "2 runs" in service.cancel(started.sweep_id).note
    for run in started.runs:
        assert finished(service, run.run_id).state == "cancelled"
    with pytest.raises(RunError, match="run_not_active"):
        service.cancel(started.sweep_id)
    again = service.sweep(both)
    assert not {run.run_id for run in again.runs} & {run.run_id for run in started.runs}
    assert all(run.state in ACTIVE_STATES for run in again.runs)
    service.cancel("mine")
    for run in again.runs:
        assert finished(service, run.run_id).state == "cancelled"
