"""The commands that start a single stage, over a real service whose workers are stand-ins."""

import json

import pytest

from opd_mcp.cli import starting
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.requests import BuildTeacherCache
from opd_mcp.server.audit import AuditLog
from opd_mcp.server.tools.table import TOOLS


def test_the_stages_of_a_distillation_one_by_one(world, service, opd_mcp, finished):
    few = ["--preset", "demo", "--json"]
    prompts, table = world.prompts("opd"), world.file("own.csv", "question\n1+1=?\n1+2=?\n")
    given = ["--teacher", world.teacher, "--prompts", table, "--column", "prompt=question", "--name", "answers"]
    answered = json.loads(opd_mcp("responses", *given, *few))
    assert (answered["kind"], answered["name"]) == ("generate", "answers")
    assert finished(service, answered["run_id"]).state == "succeeded"
    trained = json.loads(
        opd_mcp("sft", "--student", world.student, "--responses", answered["run_id"], "-s", "sft.steps=2", *few)
    )
    assert finished(service, trained["run_id"]).state == "succeeded"
    recipe = service.store.record(trained["run_id"]).request.recipe
    assert (recipe.sft.steps, recipe.preset) == (2, "demo")
    scored = json.loads(
        opd_mcp(
            *("cache", "build", "--teacher", world.teacher, "--student", trained["run_id"], "--prompts", prompts),
            *("--topk", "4", "-t", "mine", *few),
        )
    )
    assert scored["kind"] == "cache"
    assert [run.run_id for run in service.list_runs(tag="mine").rows] == [scored["run_id"]]
    assert finished(service, scored["run_id"]).state == "succeeded"
    started = json.loads(opd_mcp("start", "--student", trained["run_id"], "--cache", scored["run_id"], *few))
    assert finished(service, started["run_id"]).state == "succeeded"


def test_a_model_is_asked_measured_and_assessed(world, service, opd_mcp, finished):
    text = opd_mcp("sample", world.student, "1+1=?", "1+2=?", "--temperature", "0", "--max-new-tokens", "8")
    assert "succeeded" in text.splitlines()[0]
    [sampled] = service.list_runs().rows
    sampling = service.store.record(sampled.run_id).request.recipe.sample.sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 8)
    measured = json.loads(
        opd_mcp(
            *("benchmark", world.student, "--prompts", world.prompts("eval"), "--baseline", world.teacher),
            *("--preset", "demo", "--json"),
        )
    )
    inputs = service.store.record(measured["run_id"]).request.inputs
    assert [model.path for model in inputs.baselines] == [world.teacher]
    assert finished(service, measured["run_id"]).state == "succeeded"
    pair = ["--student", world.student, "--teacher", world.teacher, "--prompts", world.prompts("opd")]
    assessed = json.loads(opd_mcp("assess", *pair, "--preset", "demo", "--json"))
    assert assessed["kind"] == "assess"
    finished(service, assessed["run_id"])  # the stand-ins assess nothing
    calls = [json.loads(line) for line in AuditLog(service.workspace).file.read_text().splitlines()]
    assert {"sample_model", "benchmark_student", "assess_overhead"} <= {call.get("tool") for call in calls}


def test_the_curves_of_a_run_are_shown(world, service, opd_mcp, finished):
    run = finished(service, service.start_distillation(world.start_arguments()).run_id)
    text = opd_mcp("metrics", run.run_id, "-k", "distill.loss")
    assert run.run_id in text
    assert json.loads(opd_mcp("metrics", "--json"))["runs"][0]["run_id"] == run.run_id


def test_every_tool_but_the_page_s_feed_has_a_command():
    assert [spec.name for spec in TOOLS if spec.command is None] == ["dashboard_feed"]


def test_a_teacher_s_server_may_be_any_that_the_user_names(world, service, monkeypatch):
    opened = {}
    monkeypatch.setattr(starting, "open_service", lambda roots=(), **more: opened.update(more) or service)
    given = {"teacher": world.teacher, "teacher_url": "http://teacher.example.org:8001", "student": world.student}
    starting.request_of("cache build", BuildTeacherCache, given | {"prompts": world.prompts()})
    assert opened["teacher_hosts"] == ["teacher.example.org"]


def test_a_missing_file_is_named(world, opd_mcp):
    with pytest.raises(PathError, match="not_found"):
        opd_mcp("benchmark", world.student, "--prompts", f"{world.root}/data/none.jsonl")
