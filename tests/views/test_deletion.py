"""Deleting a run: what goes with it and what stays, and that nothing answers about it afterwards."""

import pytest

from opd_mcp.schemas.errors import OpdError, RunError, UnknownIdError
from opd_mcp.schemas.requests import CompareRuns, GetRunLogs, GetRunMetrics, ListArtifacts
from opd_mcp.views.deletion import run_deletion


@pytest.fixture
def two_runs(world, service, finished):
    """Two finished distillations of one SFT student and one cache, of different steps."""
    runs = []
    for steps in (2, 3):
        arguments = world.start_arguments(eval_prompts=world.prompts("eval"), overrides={"distill.steps": steps})
        runs.append(finished(service, service.start_distillation(arguments).run_id))
    assert [run.state for run in runs] == ["succeeded"] * 2, runs
    return runs


def test_the_question_lists_what_goes_and_what_stays(service, two_runs):
    first, second = two_runs
    text = service.run_deletion_question(first.run_id).text
    for role in ("model", "report"):
        assert f"{first.result['artifacts'][role]} (" in text.split("There stay")[0]
    for role in ("responses", "sft", "cache"):
        shared = first.result["artifacts"][role]
        assert f"{shared} (of {second.run_id} too)" in text.split("There stay")[1]
    assert first.name in text
    assert "cannot be undone" in text


def test_a_deleted_run_is_gone_from_every_answer_in_every_process(world, service, two_runs):
    first, second = two_runs
    other = world.service()
    other.status(first.run_id)
    deleted = service.delete_run(first.run_id)
    assert set(deleted.artifacts) == {first.result["artifacts"][role] for role in ("model", "report")}
    assert set(deleted.kept) == {first.result["artifacts"][role] for role in ("responses", "sft", "cache")}
    assert deleted.freed_bytes > 0
    asked = (
        lambda found: found.status(first.run_id),
        lambda found: found.snapshot(first.run_id),
        lambda found: found.run_metrics(GetRunMetrics(run_ids=[first.run_id])),
        lambda found: found.run_logs(GetRunLogs(run_id=first.run_id)),
        lambda found: found.compare_runs(CompareRuns(run_ids=[first.run_id])),
        lambda found: found.dashboard([first.run_id]),
        lambda found: found.wait_token(first.run_id),
        lambda found: found.delete_run(first.run_id),
        lambda found: found.resume(first.run_id),
    )
    for found in (service, other, world.service()):
        assert [row.run_id for row in found.list_runs().rows] == [second.run_id]
        assert not set(deleted.artifacts) & {row.artifact_id for row in found.list_artifacts(ListArtifacts()).rows}
        for ask in asked:
            with pytest.raises(UnknownIdError, match="unknown_run"):
                ask(found)
    assert service.store.rebuild() == []
    assert service.list_runs().total == 1
    assert list(service.workspace.root.glob(".building-*")) == []


def test_the_last_run_goes_with_everything_that_it_made(service, two_runs):
    for run in two_runs:
        service.delete_run(run.run_id)
    assert service.list_runs().total == 0
    assert service.list_artifacts(ListArtifacts()).total == 0


def test_an_active_run_is_not_deleted(world, service, busy_machine, finished):
    run_id = service.start_distillation(world.start_arguments()).run_id
    for call in (service.delete_run, service.run_deletion_question):
        with pytest.raises(RunError, match="run_active"):
            call(run_id)
    service.cancel(run_id)
    finished(service, run_id)
    assert "can then not be resumed" in service.run_deletion_question(run_id).text
    service.delete_run(run_id)
    assert service.list_runs().total == 0


def test_an_interrupted_deletion_leaves_no_run_behind(service, two_runs, monkeypatch):
    """The process dies after the run's directory has moved: the rest is garbage, and gc finds it."""
    from opd_mcp.maintenance.gc import collected

    def dies(*arguments, **options):
        raise KeyboardInterrupt

    first = two_runs[0]
    goes = {artifact.artifact_id for artifact in run_deletion(service.store, first.run_id).goes}
    monkeypatch.setattr("opd_mcp.views.deletion.delete_artifact", dies)
    with pytest.raises(KeyboardInterrupt):
        service.delete_run(first.run_id)
    monkeypatch.undo()
    with pytest.raises(OpdError, match="unknown_run"):
        service.status(first.run_id)
    report = collected(service.store, remove=True, older_than_days=0, artifacts=True)
    assert goes <= {item.path.rpartition("/")[2] for item in report.items}
    assert "deleted" in {item.kind for item in report.items}
