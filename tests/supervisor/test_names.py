"""Names, tags and notes: they follow a run everywhere, and are no part of what makes two requests the same."""

import pytest

from opd_mcp.planning.phases import request_hash
from opd_mcp.schemas.answers import ComparedRun, PairedRuns, RunComparison
from opd_mcp.schemas.errors import ArgumentError, UnknownIdError
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.requests import CompareRuns, GetRunLogs, StartDistillation
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunPhase, RunRequest
from opd_mcp.server.protocol.arguments import request_from_arguments
from opd_mcp.server.render.monitoring import comparison_text
from opd_mcp.server.render.runs import list_text, snapshot_text, status_text
from opd_mcp.supervisor.records import NAME_CHARACTERS, default_name

LABELS = {"name": "first try", "tags": ["paper", "paper", "lr:high"], "notes": "With the high rate."}


def request(kind="distill", **overrides):
    inputs = RunInputs(student=ModelInput(reference="/m/student", path="/m/student"))
    recipe = resolve_recipe("quick", overrides)
    return RunRequest(kind=kind, recipe=recipe, inputs=inputs, phases=[RunPhase(name=kind, key="k")])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (request(), "lightning student (quick)"),
        (request(**{"distill.steps": 7, "runtime.seed": 3}), "lightning student (quick), steps=7, seed=3"),
        (request(**{"sft.steps": 7}), "lightning student (quick)"),
        (request("sft", **{"sft.optimizer.learning_rate": 0.25}), "sft student (quick), learning_rate=0.25"),
    ],
)
def test_a_run_without_a_name_is_called_by_what_it_does_and_how_it_differs(made, name):
    assert default_name(made) == name


def test_a_default_name_is_never_too_long():
    changed = {"distill.advantage_clip": 3.0, "distill.steps": 77, "distill.optimizer.learning_rate": 0.123}
    name = default_name(request(**changed, **{"runtime.seed": 12345, "prompting.max_prompt_tokens": 77}))
    assert len(name) <= NAME_CHARACTERS
    assert name.endswith(", …")


def test_labels_are_in_every_answer_about_a_run_and_runs_are_found_by_them(world, service, busy_machine):
    started = service.start_distillation(world.start_arguments(**LABELS))
    other = service.start_distillation(world.start_arguments(overrides={"distill.steps": 2}))
    status = service.status(started.run_id)
    assert (status.name, status.tags, status.notes) == ("first try", ["paper", "lr:high"], LABELS["notes"])
    assert "steps=2" in service.status(other.run_id).name
    for text in (status_text(status), snapshot_text(started), list_text(service.list_runs())):
        assert "first try" in text
    [shown] = service.dashboard([started.run_id]).runs
    assert (shown.name, shown.tags, shown.notes) == ("first try", ["paper", "lr:high"], LABELS["notes"])
    for filters in ({"tag": "paper"}, {"name": "FIRST"}, {"tag": "lr:high", "state": "queued"}):
        assert [(row.run_id, row.name) for row in service.list_runs(**filters).rows] == [(started.run_id, "first try")]
    for filters in ({"tag": "pap"}, {"name": "none"}, {"tag": "paper", "state": "failed"}):
        assert service.list_runs(**filters).total == 0
    service.store.rebuild()
    assert [row.run_id for row in service.list_runs(tag="lr:high").rows] == [started.run_id]
    for run in (started, other):
        service.cancel(run.run_id)


def test_the_same_request_under_another_name_is_the_same_run_and_the_answer_says_so(world, service, busy_machine):
    first = service.start_distillation(world.start_arguments(**LABELS))
    again = service.start_distillation(world.start_arguments(name="second try", tags=["other"]))
    assert (again.run_id, again.reused, again.name) == (first.run_id, True, "first try")
    assert again.note == (
        "This request is active already as 'first try', tags paper, lr:high; the name and tags given are not used."
    )
    assert again.note in snapshot_text(again)
    assert service.start_distillation(world.start_arguments(**LABELS)).note is None
    assert service.start_distillation(world.start_arguments()).note is None
    record = service.store.record(first.run_id)
    assert record.request_hash == request_hash(record.request.kind, record.request.phases)
    service.cancel(first.run_id)


def test_a_plan_keeps_its_id_under_another_name_and_a_start_may_name_its_run(world, service, busy_machine, finished):
    arguments = world.plan_arguments(**LABELS)
    plan = service.plan(arguments)
    assert service.plan(world.plan_arguments()).plan_id == plan.plan_id
    assert service.plan(arguments).plan_id == plan.plan_id
    by_plan = service.start_distillation(StartDistillation(plan_id=plan.plan_id))
    assert by_plan.name == "first try"
    service.cancel(by_plan.run_id)
    assert finished(service, by_plan.run_id).state == "cancelled"
    named = service.start_distillation(StartDistillation(plan_id=plan.plan_id, name="by hand"))
    assert (named.reused, named.name) == (False, "by hand")
    service.cancel(named.run_id)


@pytest.mark.parametrize("bad", [{"tags": ["two words"]}, {"tags": ["x"] * 11}, {"name": " "}, {"notes": "n" * 2001}])
def test_labels_that_cannot_be_listed_are_refused(bad):
    with pytest.raises(ArgumentError, match="invalid_argument"):
        request_from_arguments("start_distillation", StartDistillation, {"plan_id": "p", **bad})


def test_a_run_is_meant_by_its_name_where_one_run_has_it(world, service, busy_machine):
    first = service.start_distillation(world.start_arguments(name="first try"))
    others = [
        service.start_distillation(world.start_arguments(name="twice", overrides={"distill.steps": steps}))
        for steps in (2, 4)
    ]
    assert service.status("first try").run_id == first.run_id
    assert service.run_logs(GetRunLogs(run_id="first try")).run_id == first.run_id
    assert [run.run_id for run in service.compare_runs(CompareRuns(run_ids=["first try"])).runs] == [first.run_id]
    with pytest.raises(UnknownIdError, match="2 runs have this name") as refused:
        service.status("twice")
    assert set(refused.value.nearest) == {run.run_id for run in others}
    with pytest.raises(UnknownIdError, match="no such run"):
        service.status("first")
    for name in ("first try", *(run.run_id for run in others)):
        service.cancel(name)
    assert first.run_id not in service.store.active_runs() or service.status("first try").cancel_requested


def test_a_name_stands_for_what_its_run_made_wherever_a_run_is_a_reference(world, service, finished):
    arguments = world.start_arguments(name="first try, small")
    run_id = finished(service, service.start_distillation(arguments).run_id).run_id
    references = service._references
    by_name, by_id = (references.model(reference).input for reference in ("first try, small", run_id))
    assert by_name == by_id, "the id is recorded: another run may get the name later"
    assert references.cache("first try, small").input.reference == run_id
    assert service.inspect_cache("first try, small") == service.inspect_cache(run_id)
    assert service.paths_behind(None, "first try, small") == service.paths_behind(None, run_id)
    with pytest.raises(UnknownIdError) as unknown:
        references.model("first try, smal")
    assert unknown.value.nearest == ["first try, small"]
    for steps in (2, 4):
        again = world.start_arguments(name="twice", overrides={"distill.steps": steps})
        finished(service, service.start_distillation(again).run_id)
    with pytest.raises(UnknownIdError, match="2 runs have this name"):
        references.model("twice")


def test_a_comparison_calls_runs_by_name_and_keys_by_what_tells_them_apart():
    def run(run_id: str, name: str | None, rank: int) -> ComparedRun:
        settings = {"sft.adapter.rank": rank, "distill.adapter.rank": 8, "distill.steps": 3}
        return ComparedRun(run_id=run_id, name=name, kind="distill", state="succeeded", settings=settings)

    runs = [run("a-1", "small", 8), run("b-2", "same", 16), run("c-3", "same", 32), run("d-4", None, 64)]
    pairs = [
        PairedRuns(candidate="a-1", baseline=other, accuracy_difference=(0.1, 0.0, 0.2), prompts=9)
        for other in ("b-2", "d-4")
    ]
    keys = ["sft.adapter.rank", "distill.adapter.rank", "distill.steps"]
    text = comparison_text(RunComparison(settings=keys, runs=runs, best="a-1", paired=pairs, next_action=NextAction()))
    head, *rows = text.splitlines()
    assert head.split()[:4] == ["run", "sft.adapter.rank", "distill.adapter.rank", "steps"]
    assert [row.split()[0] for row in rows[:4]] == ["small", "b-2", "c-3", "d-4"]
    assert "best: small (a-1)" in rows
    assert "accuracy of small minus b-2: 0.100 [0.000, 0.200], 9 prompts" in rows
