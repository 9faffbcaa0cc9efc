"""A run in rounds: phases of each, one result, and no round done twice after a stop."""

from opd_mcp.schemas.requests import ListArtifacts

ROUNDS = {"distill.rounds": 3, "distill.steps": 9}
LABELS = [
    *("generate_responses", "sft", "rollout", "score", "distill"),
    *("rollout 2", "score 2", "distill 2", "rollout 3", "score 3", "distill 3", "benchmark"),
]


def test_a_run_goes_through_its_rounds_and_ends_with_one_report(world, service, finished):
    plan = service.plan(world.plan_arguments(overrides={"sft.steps": 3, **ROUNDS}))
    assert len(plan.phases) == len(LABELS)
    estimate = next(each for each in plan.estimates if each.method == "lightning")
    assert [phase.phase for phase in estimate.phases].count("distill") == 1
    status = finished(service, service.start_distillation(world.start_arguments(overrides=ROUNDS)).run_id)
    assert (status.state, status.phases_done) == ("succeeded", LABELS)
    stages = [cost["stage"] for cost in status.result["costs"]]
    assert stages == list(dict.fromkeys(stages)), "the rounds of a stage are added up"
    assert status.result["artifacts"]["model"] == service.status(status.run_id).result["artifacts"]["model"]
    [shown] = service.dashboard([status.run_id]).runs
    assert [(phase.name, phase.state) for phase in shown.phases] == [(label, "done") for label in LABELS]


def test_a_stopped_run_goes_on_with_its_next_round(world, service, until, finished):
    overrides = {"distill.rounds": 2, "distill.steps": 200}
    run_id = service.start_distillation(world.start_arguments(overrides=overrides)).run_id
    until(service, run_id, lambda status: "distill" in status.phases_done and status.phase == "distill")
    service.cancel(run_id)
    assert finished(service, run_id).state == "cancelled"
    service.resume(run_id)
    status = finished(service, run_id)
    assert status.state == "succeeded"
    [costs] = [cost for cost in status.result["costs"] if cost["stage"] == "distill"]
    assert costs["reused"] is False
    lines = (service.workspace.run(run_id) / "journal.jsonl").read_text().splitlines()
    again = [line for line in lines if '"event":"reused"' in line and '"phase":"distill"' in line]
    assert len(again) == 1, "round 1 was taken over"


def test_rounds_that_are_not_needed_are_passed_over(world, service, finished):
    stale = {"distill.rounds": 3, "distill.round_trigger": "stale"}
    status = finished(service, service.start_distillation(world.start_arguments(overrides=stale)).run_id)
    assert (status.state, status.phases_done) == ("succeeded", LABELS)
    artifacts = [row.artifact_id for row in service.list_artifacts(ListArtifacts(kind="model")).rows]
    assert [name for name in artifacts if name.startswith("model-lightning")] == [status.result["artifacts"]["model"]]


def test_rounds_with_a_cache_need_teacher_and_prompts_and_find_them(world, service, finished):
    first = finished(service, service.start_distillation(world.start_arguments()).run_id)
    made = {"student": first.result["artifacts"]["sft"], "cache_id": first.result["artifacts"]["cache"]}
    start = world.start_arguments(overrides={"distill.rounds": 2}).model_copy(
        update={**made, "teacher": None, "prompts": None}
    )
    status = finished(service, service.start_distillation(start).run_id)
    assert (status.state, status.phases_done) == (
        "succeeded",
        ["distill", "rollout 2", "score 2", "distill 2", "benchmark"],
    )
