"""A distillation with baselines: one call, a run per arm and seed, and one comparison of quality and cost."""

import json

import pytest

from opd_mcp.grading.paired import mean_over_seeds, paired_outcomes, t95
from opd_mcp.schemas.requests import CompareRuns, StartDistillation
from opd_mcp.server.render.monitoring import comparison_text


def rewrite(service, run, outcomes, divergence):
    """Give the model of a run's report these greedy outcomes and this reverse KL."""
    file = service.store.artifacts.get(run.result["artifacts"]["report"]).path / "report.json"
    report = json.loads(file.read_text())
    accuracy = report["models"][0]["greedy_accuracy"]
    accuracy["value"] = outcomes.count("1") / len(outcomes)
    report["models"][0] |= {"greedy_right": outcomes, "reverse_kl": {**accuracy, "value": divergence}}
    file.write_text(json.dumps(report))


@pytest.fixture
def ended(service, finished):
    """`ended(snapshot)`: the finished runs of an answer's arms by (arm, seed), and their shared tag."""

    def wait(snapshot):
        tag = next(tag for tag in service.status(snapshot.run_id).tags if tag.startswith("sweep-"))
        found = {}
        for row in service.list_runs(tag=tag).rows:
            run = finished(service, row.run_id)
            assert run.state == "succeeded", run
            seed = service.store.record(row.run_id).request.recipe.runtime.seed
            [arm] = [name for name in run.tags if name.startswith("arm:")]
            found[arm.removeprefix("arm:"), seed] = run
        return tag, found

    return wait


def test_one_call_starts_every_arm_and_a_comparison_pairs_them(world, service, ended):
    evaluation = {"eval_prompts": world.prompts("eval"), "preset": "demo"}
    arguments = world.start_arguments(baseline=["live", "sft_more", "opsa"], tags=["mine"], **evaluation)
    plan = service.plan(world.plan_arguments(baseline=["live", "sft_more", "opsa"], **evaluation))
    assert {arm.name for arm in plan.arms} == {"asked", "live", "sft_more", "opsa"}
    started = service.start_distillation(arguments)
    tag, runs = ended(started)
    assert f"4 runs (asked, live, sft_more, opsa; 1 seeds), all with the tag {tag}" in started.note
    assert set(runs) == {(arm, 0) for arm in ("asked", "live", "sft_more", "opsa")}
    assert all("mine" in run.tags for run in runs.values())
    for (arm, _), run in runs.items():
        rewrite(service, run, "111100" if arm == "asked" else "110000", 0.1)
    found = service.compare_runs(CompareRuns(tag=tag))
    rows = {row.arm: row for row in found.arms}
    expected = paired_outcomes("111100", "110000")
    assert rows["live"].gain == tuple(round(v, 4) for v in (expected.value, expected.low, expected.high))
    assert rows["asked"].gain is None
    assert (rows["opsa"].accuracy, rows["opsa"].kl_change) == (0.3333, None)
    assert all(row.seconds for row in rows.values())
    assert "asked − arm" in comparison_text(found)
    again = service.start_distillation(arguments)
    assert (again.run_id, again.reused) == (started.run_id, True)


def test_over_seeds_arms_are_paired_by_seed(world, service, ended):
    arguments = world.start_arguments(baseline="live", seeds=2, eval_prompts=world.prompts("eval"))
    tag, runs = ended(service.start_distillation(arguments))
    assert set(runs) == {("asked", 0), ("live", 0), ("asked", 1), ("live", 1)}
    for (arm, seed), run in runs.items():
        right = 3 + seed + (arm == "asked") * (1 + seed)
        rewrite(service, run, "1" * right + "0" * (6 - right), 0.5 - 0.1 * right)
    [_, live] = service.compare_runs(CompareRuns(tag=tag)).arms
    expected = mean_over_seeds([1 / 6, 2 / 6])
    assert live.gain == tuple(round(v, 4) for v in (expected.value, expected.low, expected.high))
    assert live.kl_change[0] == pytest.approx(-0.15)
    assert live.runs == 2


def test_a_plan_with_arms_is_started_by_its_id(world, service, ended):
    plan = service.plan(world.plan_arguments(baseline="opsa", overrides={"sft.steps": 2, "distill.steps": 2}))
    _, runs = ended(service.start_distillation(StartDistillation(plan_id=plan.plan_id)))
    assert set(runs) == {("asked", 0), ("opsa", 0)}


def test_the_quantiles_of_t_are_those_of_its_tables():
    assert t95(1) == pytest.approx(12.706)
    for freedom, value in ((9, 2.2622), (10, 2.2281), (12, 2.1788), (20, 2.0860), (30, 2.0423), (1000, 1.9623)):
        assert t95(freedom) == pytest.approx(value, abs=5e-4)
    assert mean_over_seeds([0.5]) is None
