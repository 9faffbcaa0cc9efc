"""Deleting a run: what goes with it and what stays, and that nothing answers about it afterwards."""

import pytest

from opd_mcp.schemas.errors import OpdError, RunError, UnknownIdError
from opd_mcp.schemas.requests import CompareRuns, GetRunLogs, GetRunMetrics, ListArtifacts
from opd_mcp.views.deletion import run_deletion


def distilled(world, service, finished, steps):
    """A finished distillation of so many steps; all share the SFT student and the cache."""
    arguments = world.start_arguments(eval_prompts=world.prompts("eval"), overrides={"distill.steps": steps})
    status = finished(service, service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status
    return status


def test_a_deleted_run_is_gone_from_every_answer_with_what_only_it_needs(world, service, finished):
    first, second = (distilled(world, service, finished, steps) for steps in (2, 3))
    goes = {first.result["artifacts"][role] for role in ("model", "report")}
    stays = {first.result["artifacts"][role] for role in ("responses", "sft", "cache")}
    text = service.run_deletion_question(first.run_id).text
    assert all(f"{name} (" in text.split("There stay")[0] for name in goes)
    assert all(f"{name} (of {second.run_id} too)" in text.split("There stay")[1] for name in stays)
    assert first.name in text
    assert "cannot be undone" in text
    other = world.service()
    other.status(first.run_id)  # another process knows the run
    deleted = service.delete_run(first.run_id)
    assert (set(deleted.artifacts), set(deleted.kept)) == (goes, stays)
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
        assert not goes & {row.artifact_id for row in found.list_artifacts(ListArtifacts()).rows}
        for ask in asked:
            with pytest.raises(UnknownIdError, match="unknown_run"):
                ask(found)
    assert service.store.rebuild() == []
    assert service.list_runs().total == 1
    assert list(service.workspace.root.glob(".building-*")) == []
    service.delete_run(second.run_id)
    assert service.list_runs().total == service.list_artifacts(ListArtifacts()).total == 0


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


def test_an_interrupted_deletion_leaves_no_run_behind(world, service, finished, monkeypatch):
    """The process dies after the run's directory has moved: the rest is garbage, and gc finds it."""
    from opd_mcp.maintenance.gc import collected

    def dies(*arguments, **options):
        raise KeyboardInterrupt

    first = distilled(world, service, finished, 2)
    goes = {artifact.artifact_id for artifact in run_deletion(service.store, first.run_id).goes}
    monkeypatch.setattr("opd_mcp.views.deletion.delete_artifact", dies)
    with pytest.raises(KeyboardInterrupt):
        service.delete_run(first.run_id)
    monkeypatch.undo()
    with pytest.raises(OpdError, match="unknown_run"):
        service.status(first.run_id)
    removed = []
    while report := collected(service.store, remove=True, older_than_days=0, artifacts=True).items:
        removed += report  # what nothing descends from goes first
    assert goes <= {item.path.rpartition("/")[2] for item in removed}
    assert "deleted" in {item.kind for item in removed}
    assert service.list_artifacts(ListArtifacts()).total == 0
