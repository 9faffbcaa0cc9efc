"""The commands for people, in this process over a real service whose workers are stand-ins."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from opd_mcp.cli import app, starting
from opd_mcp.cli.live import bar, sparkline, view_lines, waiting_text
from opd_mcp.cli.shared import on_terminal, wrapped
from opd_mcp.schemas.errors import PathError, PlanError, UnknownIdError
from opd_mcp.schemas.requests import SampleModel, StartDistillation, Sweep
from opd_mcp.store.run_view import seconds_of
from opd_mcp.store.runs import LOG_FILE

RAW_TYPES = re.compile(r"<(str|int|bool|float|path|list\[\w+\])>|\b(TEXT|INTEGER|PATH|FLOAT|DIRECTORY|FILE)\b")


@pytest.fixture
def two_runs(world, service, finished):
    """Two finished distillations, named and tagged."""
    runs = []
    for steps in (2, 3):
        changes = {"eval_prompts": world.prompts("eval"), "overrides": {"distill.steps": steps}}
        arguments = world.start_arguments(name=f"{steps} steps", tags=["pair"], **changes)
        runs.append(finished(service, service.start_distillation(arguments).run_id))
    assert [run.state for run in runs] == ["succeeded"] * 2, runs
    return runs


def commands():
    """The words of every command that is shown, its groups included."""
    found = []

    def walk(command, words):
        found.append(words)
        for name, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                walk(inner, [*words, name])

    walk(typer.main.get_command(app), [])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_help_is_in_words_without_types_of_python(words):
    shown = CliRunner().invoke(app, [*words, "-h"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
    assert RAW_TYPES.search(shown.output) is None, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "…" not in shown.output, "a name or word is cut"


def test_the_version_is_one_line():
    assert re.fullmatch(r"opd-mcp \d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).output)


def test_what_was_planned_is_started_by_its_id_and_found_by_name_and_tag(world, service, opd_mcp, busy_machine):
    sources = ["--student", world.student, "--teacher", world.teacher, "--prompts", world.prompts()]
    settings = ["--preset", "demo", "--set", "distill.steps=3", "-s", "sft.steps=3"]
    labels = ["--name", "by hand", "-t", "mine"]
    plan = json.loads(opd_mcp("plan", *sources, *settings, *labels, "--json"))
    assert plan["recipe"]["distill"]["steps"] == 3
    started = json.loads(opd_mcp("start", plan["plan_id"], "--json"))
    assert started["name"] == "by hand"
    assert "reused" in opd_mcp("start", *sources, *settings)
    rows = json.loads(opd_mcp("list", "--tag", "mine", "--name", "HAND", "--state", "queued", "--json"))["rows"]
    assert [row["run_id"] for row in rows] == [started["run_id"]]
    table = opd_mcp("list").splitlines()
    assert table[0].split() == ["STATE", "NAME", "RUN", "CREATED", "MODELS", "TAGS"]
    assert table[1].startswith("queued  by hand")
    assert table[-1] == "1 of 1 runs"
    assert "0 of 0 runs" in opd_mcp("list", "--state", "failed")
    assert "cancel requested" in opd_mcp("cancel", "mine")


def test_a_mistyped_relative_path_is_missing_and_a_blocked_plan_ends_with_1(world, service, opd_mcp, monkeypatch):
    monkeypatch.chdir(Path(world.student).parents[1])
    model = Path(world.student)
    given = ["--teacher", world.teacher, "--prompts", world.prompts("opd")]
    with pytest.raises(PathError, match=r"not_found.*studnet"):
        opd_mcp("plan", "--student", f"{model.parent.name}/studnet", *given)
    blocked = ["plan", "--student", world.student, *given, "-s", "rollout.sampling.max_new_tokens=4096"]
    done = CliRunner().invoke(app, list(map(str, blocked)))
    assert (done.exit_code, "BLOCKING [too_long]" in done.output) == (1, True), done.output


def test_several_teachers_are_given_by_domain(world, service, opd_mcp, monkeypatch):
    opened = []
    monkeypatch.setattr(starting, "open_service", lambda roots=(), **more: opened.append({*roots}) or service)
    monkeypatch.chdir(Path(world.teacher).parent)
    teachers = f"plain={Path(world.teacher).name},styled={world.other_teacher}"
    prompts = world.prompts("divided", teacher_domain="plain")
    given = ["--student", world.student, "--teacher", teachers, "--prompts", prompts, "--preset", "demo"]
    plan = json.loads(opd_mcp("plan", *given, "--json"))
    assert plan["consistency"]["teacher"]["members"].keys() == {"plain", "styled"}
    assert {Path(world.teacher), Path(world.other_teacher)} <= opened[-1], "each may be read"


def test_what_a_plan_or_a_run_was_given_may_be_read_again_at_the_terminal(world, service, monkeypatch, finished):
    opened = []
    monkeypatch.setattr(starting, "open_service", lambda roots=(), **more: opened.append({*roots}) or service)
    prompts = world.prompts("opd")
    plan = service.plan(world.plan_arguments(prompts=prompts))
    starting.request_of("start", StartDistillation, {"plan_id": plan.plan_id})
    needed = {Path(world.student), Path(world.teacher), Path(prompts).parent}
    assert needed <= opened[-1]
    run = finished(service, service.start_distillation(StartDistillation(plan_id=plan.plan_id)).run_id)
    for cache in (run.run_id, run.result["artifacts"]["cache"]):
        starting.request_of("sweep", Sweep, {"cache_id": cache, "points": [{"distill.steps": 2}]})
        assert needed <= opened[-1]


def test_runs_are_shown_compared_reported_and_deleted(world, service, opd_mcp, two_runs, finished):
    first, second = (run.run_id for run in two_runs)
    [shown] = service.dashboard([second]).runs
    assert all(max(map(len, view_lines(shown, width))) <= width for width in (60, 80, 120))
    view = "\n".join(view_lines(shown, 80))
    assert "3 steps: succeeded" in view
    assert "✓ distill" in view
    assert view.splitlines()[0] in opd_mcp("watch", second, "--once")
    running = shown.model_copy(
        update={"phases": [*shown.phases[:-1], shown.phases[-1].model_copy(update={"state": "running"})]}
    )
    log = ["2026-11-28T10:00:00.123Z INFO opd_mcp.engine: step 2 of 3", "2026-11-28T10:00:01.5Z WARNING x.y: slow"]
    lines = view_lines(running, 80, log)
    place = next(number for number, line in enumerate(lines) if line.lstrip().startswith("▶"))
    assert [line.strip() for line in lines if line.strip().startswith("10:00")] == [
        "10:00:00 step 2 of 3",
        "10:00:01 WARNING slow",
    ]
    assert max(number for number, line in enumerate(lines) if "10:00:01" in line) in (place + 2, place + 3)
    assert not [line for line in view_lines(shown, 80, log) if "10:00" in line]
    for asked in ([first, second], ["pair"]):
        text = opd_mcp("compare", *asked)
        assert "2 steps" in text
        assert "0.500 [0.400, 0.600]" in text
    assert len(json.loads(opd_mcp("compare", "pair", "--json"))["runs"]) == 2
    report = json.loads(opd_mcp("report", first, "--json"))
    assert report["models"][0]["greedy_accuracy"]["value"] == 0.5
    sampled = finished(service, service.sample_model(SampleModel(model=world.student, prompts=["1+1=?"])).run_id).run_id
    newest = json.loads(opd_mcp("report", "--json"))
    assert newest == json.loads(opd_mcp("report", second, "--json")), "the newest run has none"
    with pytest.raises(UnknownIdError, match=f"measures nothing.*newest run with a report is {second}"):
        opd_mcp("report", sampled)
    model = two_runs[0].result["artifacts"]["model"]
    assert model in opd_mcp("artifacts", "--kind", "model")
    with pytest.raises(PlanError, match=r"declined.*goes with its settings"):
        opd_mcp("rm", first)  # nobody can be asked without a terminal
    assert f"deleted with it: {model}" in opd_mcp("rm", first, "--yes")
    assert model not in opd_mcp("artifacts")
    assert json.loads(opd_mcp("rm", "-y", second, "--json"))["run_id"] == second
    opd_mcp("rm", "-y", sampled)
    assert "0 of 0 runs" in opd_mcp("list")


def test_a_sweep_is_started_from_a_run_and_its_values_are_numbers(service, opd_mcp, two_runs, busy_machine, finished):
    run_id = two_runs[0].run_id
    options = ["--preset", "demo", "-g", "distill.steps=4,5", "-g", "runtime.seed=[7]", "--name", "steps"]
    started = json.loads(opd_mcp("sweep", run_id, *options, "--json"))
    assert [run["settings"] for run in started["runs"]] == [
        {"distill.steps": 4, "runtime.seed": 7},
        {"distill.steps": 5, "runtime.seed": 7},
    ]
    points = ["-p", "distill.steps=4 runtime.seed=7", "-p", "distill.steps=5 runtime.seed=7"]
    again = json.loads(opd_mcp("sweep", run_id, "--preset", "demo", *points, "--json"))
    assert again["sweep_id"] == started["sweep_id"]
    assert "cancel requested for 2 runs" in opd_mcp("cancel", started["sweep_id"])
    swept = [run["run_id"] for run in started["runs"]]
    compared = json.loads(opd_mcp("compare", started["sweep_id"], two_runs[1].run_id, "--json"))
    assert [run["run_id"] for run in compared["runs"]] == [*swept, two_runs[1].run_id]
    with pytest.raises(UnknownIdError, match="a tag of 2 runs") as refused:
        opd_mcp("status", started["sweep_id"])
    assert set(refused.value.nearest) == set(swept)
    for run in swept:
        finished(service, run)
    opd_mcp("rm", "-y", started["sweep_id"])
    assert not [run for run in swept if service.store.exists(run)]


def test_a_log_is_followed_until_the_run_ends(world, service, opd_mcp, busy_machine, finished):
    run_id = service.start_distillation(world.start_arguments()).run_id
    log = service.workspace.run(run_id) / LOG_FILE
    with log.open("a") as file:
        file.write("before\n")
    printed: list[str] = []
    follower = threading.Thread(target=lambda: printed.append(opd_mcp("logs", run_id, "-f")))
    follower.start()
    time.sleep(1.0)  # the page is read; what comes now is followed
    with log.open("a") as file:
        file.write("after\n")
    service.cancel(run_id)
    finished(service, run_id)
    follower.join(30)
    lines = printed[0].splitlines()
    assert (lines.count("before"), lines.count("after")) == (1, 1)


def test_a_sparkline_goes_from_the_lowest_to_the_highest_block():
    assert sparkline([0.0, 1.0, 2.0, 3.0]) == "▁▃▆█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert len(sparkline([float(number) for number in range(500)], 30)) == 30
    assert sparkline([]) == ""
    assert (bar(1, 2, 4), bar(0, 0, 4)) == ("██░░", "░░░░")


def test_the_seconds_before_the_first_progress_say_what_happens(world, service, busy_machine):
    run_id = service.start_distillation(world.start_arguments()).run_id
    status, [shown] = service.status(run_id), service.dashboard([run_id]).runs
    assert status.state == "queued"
    later = seconds_of(status.created_at) + 61
    assert waiting_text(status.model_copy(update={"waits_for": None}), later) == "its process starts, for 61 s"
    said = waiting_text(status.model_copy(update={"waits_for": "waits for a CPU slot"}), later)
    assert said == "waits for a CPU slot, for 61 s"
    assert f"  {said}" in view_lines(shown, 200, waits=said)
    begun = status.model_copy(update={"state": "running"})
    assert waiting_text(begun, 0.0) == "its process starts"
    assert waiting_text(begun.model_copy(update={"phase": "sft"}), 0.0) is None
    first, *others = shown.phases
    running = shown.model_copy(update={"phases": [first.model_copy(update={"state": "running"}), *others]})
    assert "      the process starts and loads the models" in view_lines(running, 80)
    service.cancel(run_id)


def test_long_lines_are_broken_between_words():
    text = "score of distilled: greedy_accuracy 0.912 [0.887, 0.934], reverse_kl 0.0132\n  short"
    lines = wrapped(text, 40).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert lines[-1] == "  short"


def test_a_loss_and_its_cause_are_red_at_a_terminal(monkeypatch):
    text = "a-1: succeeded\nVERDICT worse: accuracy fell\ncause: the rate\nVERDICT better: it rose"
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = on_terminal(text, 80).splitlines()
    assert [line.startswith("\x1b[31m") for line in lines] == [False, True, True, False]
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal(text, 80) == text


def test_a_plan_that_costs_much_is_asked_about(world, service, opd_mcp, monkeypatch):
    monkeypatch.setattr(starting, "GPU_HOURS", 0.0)
    plan = service.plan(world.plan_arguments())
    with pytest.raises(PlanError, match="declined"):
        opd_mcp("start", plan.plan_id)
    assert service.list_runs().total == 0
    started = service.start_distillation(StartDistillation(plan_id=plan.plan_id))
    assert f"run_id: {started.run_id}" in opd_mcp("start", plan.plan_id, "--yes")
    service.cancel(started.run_id)
