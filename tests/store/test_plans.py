"""Plans are kept under their ids."""

import pytest

from opd_mcp.schemas.errors import UnknownIdError
from opd_mcp.schemas.plans import ConsistencyVerdict, Plan
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.runs import RunInputs
from opd_mcp.store.plans import read_plan, save_plan


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
        next_action="start_distillation",
    )


def test_a_plan_is_read_as_it_was_saved(workspace, plan):
    save_plan(workspace, plan)
    save_plan(workspace, plan)
    assert read_plan(workspace, plan.plan_id) == plan


@pytest.mark.parametrize("plan_id", ["plan-0a1b2d", "../plan-0a1b2c"])
def test_an_unknown_plan_names_the_nearest(workspace, plan, plan_id):
    save_plan(workspace, plan)
    with pytest.raises(UnknownIdError) as caught:
        read_plan(workspace, plan_id)
    assert (caught.value.code, caught.value.nearest) == ("unknown_plan", [plan.plan_id])
