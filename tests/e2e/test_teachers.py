"""Teachers of other kinds over a real server: one that sees more than its student, several, one without log-probs."""

import json

import pytest

pytestmark = pytest.mark.anyio

FINAL = {"succeeded", "failed", "cancelled", "lost"}


async def followed(client, answer, run_id):
    """The run's last status."""
    for _ in range(60):
        status = await answer(client, "get_run_status", run_id=run_id, wait_seconds=25)
        if status["state"] in FINAL:
            return status
    raise AssertionError(f"{run_id} did not end: {status}")


async def test_a_model_is_distilled_into_itself_with_what_only_its_teacher_sees(world, connect, answer):
    rows = [json.loads(line) for line in (world.data / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        row["teacher_messages"] = [{"role": "user", "content": f"{row['answer']};{row['prompt']}"}]
    hinted = world.data / "hinted.jsonl"
    hinted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = world.plan_arguments()
    own = {"sft.skip": True, "prompting.teacher_system": "1;2", "distill.adapter": {"rank": 2}}
    overrides = given["overrides"] | own
    del given["sft_prompts"]
    async with connect() as client:
        run = await answer(
            client,
            "start_distillation",
            **given | {"student": given["teacher"], "prompts": str(hinted), "overrides": overrides},
        )
        status = await followed(client, answer, run["run_id"])
    assert status["state"] == "succeeded", status
    report = json.loads(next((world.workspace / "artifacts" / "report").glob("*/report.json")).read_text())
    assert report["teacher"]["context"].keys() == {"system"}  # of the eval prompts, which have no hints
    assert [model["name"] for model in report["models"]] == ["distilled", "base", "teacher"]
    cache = next((world.workspace / "artifacts" / "cache").glob("*/manifest.json"))
    manifest = json.loads(cache.read_text())
    assert manifest["teacher"]["context"].keys() == {"system", "rows"}
    assert manifest["sft_teacher"]["basis"] == "by_construction"
    assert manifest["scores"]["reverse_kl_k3"] > 0


async def test_two_teachers_each_teach_their_domain_and_only_right_responses_are_learnt(world, connect, answer):
    for name in ("prompts", "sft", "eval"):
        file = world.data / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["teacher_domain"] = "styled" if number % 2 else "plain"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = world.plan_arguments()
    teacher = given["teacher"]
    # answers need more room than the short runs of the other tests have: cut ones are not right
    own = {"responses.keep": "right", "responses.samples": 4, "responses.sampling.max_new_tokens": 64}
    own |= {"distill.domain_weights": {"styled": 2}}
    given |= {"teacher": {"plain": teacher, "styled": f"{teacher}_other_style"}, "overrides": given["overrides"] | own}
    async with connect() as client:
        run = await answer(client, "start_distillation", **given)
        status = await followed(client, answer, run["run_id"])
        assert status["state"] == "succeeded", status
        metrics = await answer(client, "get_run_metrics", run_ids=[run["run_id"]], keys=["reverse_kl_k1_styled"])
    assert "reverse_kl_k1_styled" in json.dumps(metrics)
    manifest = json.loads(next((world.workspace / "artifacts" / "cache").glob("*/manifest.json")).read_text())
    assert manifest["domains"] == {"plain": 4, "styled": 4}
    assert manifest["teacher"]["members"].keys() == {"plain", "styled"}
    assert manifest["sft_teacher"]["basis"] == "proven"
    report = json.loads(next((world.workspace / "artifacts" / "report").glob("*/report.json")).read_text())
    assert report["models"][0]["reverse_kl"]["value"] >= 0
    assert report["models"][0]["by_domain"].keys() == {"plain", "styled"}
    assert "several" in report["not_measured"]["teacher"]
