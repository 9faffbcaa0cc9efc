"""Runs in one table: what differs, the figures of their reports, and paired differences where prompts are the same."""

import json

import pytest

from opd_mcp.grading.paired import paired_estimate, paired_outcomes
from opd_mcp.schemas.errors import ArgumentError, UnknownIdError
from opd_mcp.schemas.requests import CompareRuns, StartDistillation
from opd_mcp.server.render.monitoring import comparison_text


@pytest.fixture
def three_runs(world, service, finished):
    """Three finished distillations: 2, 3 and 4 steps, all named and tagged."""
    runs = []
    for steps in (2, 3, 4):
        labels = {"name": f"{steps} steps", "tags": ["trio"]}
        changes = {"eval_prompts": world.prompts("eval"), "overrides": {"distill.steps": steps}}
        runs.append(finished(service, service.start_distillation(world.start_arguments(**labels, **changes)).run_id))
    assert [run.state for run in runs] == ["succeeded"] * 3, runs
    return runs


def rewrite(service, run, outcomes, **changes):
    """Give the measured model of a run's report these outcomes, one per prompt."""
    file = service.store.artifacts.get(run.result["artifacts"]["report"]).path / "report.json"
    report = {**json.loads(file.read_text()), **changes}
    share = outcomes.count("1") / len(outcomes)
    report["models"][0] |= {"greedy_right": outcomes}
    report["models"][0]["greedy_accuracy"] |= {"value": share}
    file.write_text(json.dumps(report))


def test_the_table_has_what_differs_and_pairs_the_best_with_those_measured_on_the_same_prompts(service, three_runs):
    for run, outcomes in zip(three_runs, ("110000", "111100", "101100"), strict=True):
        rewrite(service, run, outcomes)
    found = service.compare_runs(CompareRuns(tag="trio"))
    ids = [run.run_id for run in three_runs]
    assert [(row.run_id, row.name) for row in found.runs] == list(
        zip(ids, ("2 steps", "3 steps", "4 steps"), strict=True)
    )
    assert found.settings == ["distill.steps"]
    assert [row.settings for row in found.runs] == [{"distill.steps": steps} for steps in (2, 3, 4)]
    assert [row.accuracy[0] for row in found.runs] == [0.3333, 0.6667, 0.5]
    assert found.best == ids[1]
    expected = paired_outcomes("111100", "110000")
    first = found.paired[0]
    assert (first.candidate, first.baseline, first.prompts) == (ids[1], ids[0], 6)
    assert first.accuracy_difference == tuple(round(v, 4) for v in (expected.value, expected.low, expected.high))
    assert found.paired[1].accuracy_difference[0] == pytest.approx(1 / 6, abs=1e-4)
    assert any("flatters" in note for note in found.notes)
    assert found.next_action.arguments == {"model": ids[1]}
    text = comparison_text(found)
    for part in ("3 steps", "0.667 [", "steps", "minus", "accuracy: "):
        assert part in text
    assert [row.run_id for row in service.dashboard(ids[:2]).comparison.runs] == ids[:2]
    rewrite(service, three_runs[0], "110000", prompts_sha256="f" * 64)
    (service.store.artifacts.get(three_runs[2].result["artifacts"]["report"]).path / "report.json").unlink()
    found = service.compare_runs(CompareRuns(run_ids=ids))
    assert found.paired == []
    assert any("other prompts" in note for note in found.notes)
    assert found.runs[2].not_measured == "its report is gone"
    assert found.runs[2].accuracy is None
    with pytest.raises(UnknownIdError) as caught:
        service.compare_runs(CompareRuns(tag="trios"))
    assert caught.value.nearest == ["trio"]


def test_settings_of_a_stage_that_a_run_did_not_compute_are_not_its_own(service, world, three_runs, finished):
    whole = three_runs[0]
    arguments = {"student": whole.result["artifacts"]["sft"], "cache_id": whole.result["artifacts"]["cache"]}
    changes = {"preset": "quick", "overrides": {"sft.steps": 77, "distill.steps": 5, "runtime.device": "cpu"}}
    from_cache = finished(service, service.start_distillation(StartDistillation(**arguments, **changes)).run_id)
    again = world.start_arguments(overrides={"sft.steps": 4})
    other = finished(service, service.start_distillation(again).run_id)
    found = service.compare_runs(CompareRuns(run_ids=[whole.run_id, from_cache.run_id]))
    assert not [key for key in found.settings if key.startswith(("sft.", "responses.", "rollout.", "score."))]
    assert found.runs[1].settings["distill.steps"] == 5
    three = service.compare_runs(CompareRuns(run_ids=[whole.run_id, from_cache.run_id, other.run_id]))
    steps = [row.settings.get("sft.steps") for row in three.runs]
    assert steps == [3, None, 4], "nothing is shown for a run that has no SFT"


def test_a_run_with_a_bad_verdict_is_the_best_only_where_all_have_one(service, three_runs):
    bad = {
        "judgement": "worse",
        "sentence": "It is worse.",
        "cause": "It collapsed.",
        "next_action": {"why": "Lower it."},
    }
    good = {"judgement": "better", "sentence": "It is better.", "next_action": {"why": "Export it."}}
    for run, outcomes, verdict in zip(three_runs, ("110000", "111100", "101100"), (good, bad, good), strict=True):
        rewrite(service, run, outcomes, verdict=verdict)
    found = service.compare_runs(CompareRuns(tag="trio"))
    assert found.best == three_runs[2].run_id
    assert found.next_action.tool == "benchmark_student"
    for run, outcomes in zip(three_runs, ("110000", "111100", "101100"), strict=True):
        rewrite(service, run, outcomes, verdict=bad)
    found = service.compare_runs(CompareRuns(tag="trio"))
    assert found.best == three_runs[1].run_id
    assert found.next_action.tool == "get_run_status"
    assert "None of these runs is better" in found.next_action.why


@pytest.mark.parametrize("wrong", [{}, {"run_ids": ["run-1"], "tag": "trio"}])
def test_a_comparison_is_of_runs_or_of_a_tag(service, wrong):
    with pytest.raises(ArgumentError, match="run_ids, or"):
        service.compare_runs(CompareRuns(**wrong))


def test_outcomes_count_what_only_one_of_the_two_has_right():
    assert paired_outcomes("1101", "1010") == paired_estimate(2, 1, 4)
    with pytest.raises(ValueError, match="shorter"):
        paired_outcomes("11", "1")
