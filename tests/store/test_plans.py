"""Plans are kept under their ids."""

import json

import pytest

from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError
from opd_mcp.schemas.next_action import NextAction, next_call
from opd_mcp.schemas.plans import ConsistencyVerdict, Plan
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs
from opd_mcp.store.workspace import read_arguments, read_plan, save_plan


@pytest.fixture
def plan():
    return Plan(
        plan_id="plan-0a1b2c",
        method="lightning",
        inputs=RunInputs(),
        recipe=Recipe(),
        phases=[],
        consistency=ConsistencyVerdict(status="unknown"),
        estimates=[],
        next_action=next_call("start_distillation"),
    )


@pytest.fixture
def arguments():
    return PlanDistillation(student="a", teacher="b", prompts="c")


def test_a_plan_is_read_as_it_was_saved(workspace, plan, arguments):
    save_plan(workspace, plan, arguments)
    save_plan(workspace, plan, arguments)
    assert read_plan(workspace, plan.plan_id) == plan
    assert read_arguments(workspace, plan) == arguments


@pytest.mark.parametrize("suffix", ["json", "arguments"])
def test_a_damaged_plan_is_named(workspace, plan, arguments, suffix):
    save_plan(workspace, plan, arguments)
    file = workspace.plans / f"{plan.plan_id}.{suffix}"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=file.name):
        read_arguments(workspace, read_plan(workspace, plan.plan_id))


def test_a_plan_with_another_number_is_not_the_plan_that_was_agreed_to(workspace, plan, arguments):
    save_plan(workspace, plan, arguments)
    file = workspace.plans / f"{plan.plan_id}.json"
    file.write_text(file.read_text().replace('"steps": 250', '"steps": 350'))
    with pytest.raises(IntegrityError, match="not what was written"):
        read_plan(workspace, plan.plan_id)


@pytest.mark.parametrize("plan_id", ["plan-0a1b2d", "../plan-0a1b2c"])
def test_an_unknown_plan_names_the_nearest(workspace, plan, arguments, plan_id):
    save_plan(workspace, plan, arguments)
    with pytest.raises(UnknownIdError) as caught:
        read_plan(workspace, plan_id)
    assert (caught.value.code, caught.value.nearest) == ("unknown_plan", [plan.plan_id])


def test_a_plan_of_version_1_keeps_its_next_step_as_a_sentence(workspace, plan, arguments):
    save_plan(workspace, plan, arguments)
    file = workspace.plans / f"{plan.plan_id}.json"
    written = json.loads(file.read_text())
    written["plan"]["next_action"] = "Call start_distillation(plan_id='p')"
    written["schema_version"] = 1
    written["self_sha256"] = content_hash({**written, "self_sha256": ""})
    file.write_text(json.dumps(written))
    assert read_plan(workspace, plan.plan_id).next_action == NextAction(why="Call start_distillation(plan_id='p')")
