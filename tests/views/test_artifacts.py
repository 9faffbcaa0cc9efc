"""Artifacts in pages, and deletion that refuses what something else needs."""

import pytest

from opd_mcp.identity.lineage import read_lineage, write_lineage
from opd_mcp.schemas.errors import ArgumentError, IntegrityError, UnknownIdError
from opd_mcp.schemas.identity import Lineage, Parent
from opd_mcp.schemas.requests import ListArtifacts, SampleModel


@pytest.fixture
def made(world, service, finished):
    """A finished distillation's artifact ids by role."""
    arguments = world.start_arguments(sft_prompts=world.prompts("sft"))
    status = finished(service, service.start_distillation(arguments).run_id)
    assert status.state == "succeeded", status
    return status.result["artifacts"]


def test_artifacts_are_listed_newest_first_in_pages(service, made):
    first = service.list_artifacts(ListArtifacts(limit=2))
    assert first.total == len(made)
    rest = service.list_artifacts(ListArtifacts(limit=100, cursor=first.next_cursor))
    ids = [row.artifact_id for row in [*first.rows, *rest.rows]]
    assert sorted(ids) == sorted(made.values())
    assert ids[0] == made["report"]
    assert rest.next_cursor is None
    assert [row.kind for row in service.list_artifacts(ListArtifacts(kind="cache")).rows] == ["cache"]
    with pytest.raises(ArgumentError):
        service.list_artifacts(ListArtifacts(cursor="nonsense"))
    with pytest.raises(ArgumentError, match="not a cursor"):
        service.list_artifacts(ListArtifacts(cursor="~/~"))


def test_an_artifact_with_a_damaged_record_is_named_beside_the_others(world, service, made):
    record = world.root / "home" / "artifacts" / "cache" / made["cache"] / "artifact.json"
    record.write_text(record.read_text().replace('"kind": "cache"', '"kind": "model"'))
    listed = service.list_artifacts(ListArtifacts())
    assert listed.damaged == [made["cache"]]
    assert made["cache"] not in {row.artifact_id for row in listed.rows}


def test_what_something_else_came_from_is_kept(service, made):
    for role in ("responses", "sft", "cache", "model"):
        with pytest.raises(IntegrityError) as caught:
            service.delete_artifact(made[role])
        assert caught.value.code == "artifact_needed"


def test_the_last_of_a_chain_goes_and_then_the_one_before(service, made):
    for role in ("report", "model", "cache", "sft", "responses"):
        path = service.store.artifacts.get(made[role]).path
        assert service.delete_artifact(made[role]).freed_bytes > 0
        assert not path.exists()
        with pytest.raises(UnknownIdError):
            service.delete_artifact(made[role])
    assert service.list_artifacts(ListArtifacts()).total == 0


def test_a_copied_lineage_is_enough_to_keep_a_model(service, made):
    for role in ("report", "model", "cache"):
        service.delete_artifact(made[role])
    identity = read_lineage(service.store.artifacts.get(made["sft"]).path).model
    building = service.store.artifacts.new_building_directory("cache")
    parents = [Parent(role="student", identity=identity)]
    write_lineage(building, Lineage(kind="cache", stage="score", recipe={}, parents=parents))
    service.store.artifacts.publish("cache", building, artifact_id="cache-copied", key="k")
    with pytest.raises(IntegrityError) as caught:
        service.delete_artifact(made["sft"])
    assert "cache-copied" in caught.value.message


def test_an_active_run_keeps_what_it_uses(service, made, busy_machine):
    service.delete_artifact(made["report"])
    run = service.sample_model(SampleModel(model=made["model"], prompts=["1+1=?"]))
    with pytest.raises(IntegrityError) as caught:
        service.delete_artifact(made["model"])
    assert run.run_id in caught.value.message
    service.cancel(run.run_id)


def test_a_sample_answers_with_texts_cut_to_size(world, service, finished):
    run = service.sample_model(SampleModel(model=world.student, prompts=["1+1=?", "2+2=?"], max_new_tokens=8))
    status = finished(service, run.run_id)
    assert status.state == "succeeded", status
    samples = status.result["samples"]
    assert [sample["prompt"] for sample in samples] == ["1+1=?", "2+2=?"]
    assert "1300 more characters" in samples[0]["response"]
    assert status.result["paths"]["samples"].endswith("samples.json")
