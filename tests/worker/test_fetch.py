"""Models of the Hub: fetched by the worker, or a clear error without a network."""

import shutil

import pytest

from opd_mcp.planning.hub_models import FETCHED_FILES, hub_directory
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker.fetch import fetched_model


def test_without_a_network_the_run_fails_with_the_way_out(service, world, finished, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(world.root / "hf"))
    run = service.start_distillation(world.start_arguments(teacher="org/teacher", declared_teacher="org/teacher"))
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "offline")
    assert "absolute path" in status.error.fix
    assert not list((world.root / "home" / "hub").rglob("*.json"))


def test_a_fetched_model_is_a_local_one_from_then_on(service, world, finished):
    local = hub_directory(service.workspace, "org/teacher")
    shutil.copytree(world.teacher, local)
    plan = service.plan(world.plan_arguments(teacher="org/teacher"))
    assert plan.phases[0].name == "generate_responses"
    assert plan.inputs.teacher.identity.name == "org/teacher"
    by_path = service.plan(world.plan_arguments())
    assert [phase.key for phase in plan.phases] == [phase.key for phase in by_path.phases]


def test_a_model_that_is_here_needs_no_network(tmp_path):
    workspace = Workspace(tmp_path)
    hub_directory(workspace, "org/name").mkdir(parents=True)
    assert fetched_model(workspace, "org/name") == hub_directory(workspace, "org/name")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".py", ".h5"])
def test_no_code_and_no_pickle_is_ever_fetched(suffix):
    assert not any(pattern.endswith(suffix) for pattern in FETCHED_FILES)
