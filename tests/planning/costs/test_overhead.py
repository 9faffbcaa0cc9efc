"""From measured speeds to live against lightning, and to what later plans estimate by."""

from dataclasses import replace

import pytest

from opd_mcp.devices.hardware import Target
from opd_mcp.planning.costs.estimates import CostModel
from opd_mcp.planning.costs.overhead import MeasuredWork, _costs, overhead_of
from opd_mcp.planning.costs.workload import DataSize, Workload
from opd_mcp.schemas.memory import ModelShape
from opd_mcp.schemas.reports import Assessment, MeasuredSpeed, PairSide
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunPhase

SHAPE = ModelShape(10**6, layers=2, hidden=64, query_width=64, kv_width=64, intermediate=128, vocab=1000)
SECONDS = {"answer": 4.0, "generate": 2.0, "score": 1.0, "sft": 8.0, "generate_live": 3.0, "distill": 6.0}
STEPS = {"distill.steps": 10, "assess.steps": 2, "assess.sft_steps": 4}
SETTINGS = STEPS | {"distill.batch_size": 16, "sft.batch_size": 8, "rollout.count": None}


@pytest.fixture
def found() -> MeasuredWork:
    side = PairSide(teacher_logprob=-1.0, own_logprob=-1.0, topk_overlap=0.5, truncated=0.0)
    speeds = [
        MeasuredSpeed(work=w, rows=8, tokens=80, seconds=s, tokens_per_second=80 / s, peak_memory_bytes=1 << 20)
        for w, s in SECONDS.items()
    ]
    assessment = Assessment(
        hardware="CPU",
        rows=8,
        topk=8,
        sft_steps=4,
        load_seconds={"teacher": 1.0, "student": 1.0},
        speeds=speeds,
        before=side,
        after=side,
        teacher_truncated=0.0,
        judgement="works",
        diagnosis="This pair should work.",
    )
    workload = Workload(resolve_recipe("demo", SETTINGS), SHAPE, SHAPE, DataSize(80, 5.0, 80))
    return MeasuredWork(workload, assessment)


def test_a_measured_speed_gives_the_seconds_of_more_rows_and_steps(found):
    assert found.seconds("rollout") == pytest.approx(SECONDS["generate"] * 80 / 8)
    assert found.seconds("score") == pytest.approx(SECONDS["score"] * 80 / 8)
    # two steps of eight rows took six seconds: ten of sixteen take ten times as long
    assert found.seconds("distill") == pytest.approx(SECONDS["distill"] * (10 * 16) / (2 * 8))
    assert found.overhead_per_step == pytest.approx((SECONDS["generate_live"] + SECONDS["score"]) * 16 / 8)


def test_live_is_dearer_once_its_steps_have_paid_for_the_cache(found):
    overhead = overhead_of(found)
    once, live = overhead.methods
    cache = found.seconds("rollout") + found.seconds("score")
    assert once.seconds == pytest.approx(cache + found.seconds("distill"))
    assert live.seconds == pytest.approx(found.seconds("distill") + 10 * found.overhead_per_step)
    assert overhead.break_even_steps == -(-cache // found.overhead_per_step) == 4
    assert overhead.students_per_cache == 1
    few = found.workload.recipe.model_copy(
        update={"distill": found.workload.recipe.distill.model_copy(update={"steps": 1})}
    )
    shorter = overhead_of(replace(found, workload=replace(found.workload, recipe=few)))
    assert shorter.break_even_steps == 4
    assert shorter.students_per_cache == 4
    assert (once.teacher_seconds, live.teacher_seconds) == (found.seconds("score"), live.seconds)
    assert set(overhead.basis) == {
        *("seconds", "peak_memory_bytes", "devices", "break_even_steps", "students_per_cache"),
    }


def test_plans_of_the_same_models_estimate_by_the_assessment_whatever_their_size(found):
    costs = _costs(found, "cpu", "these models")
    target = Target("cpu", "a CPU", 1 << 40)
    larger = replace(found.workload, data=DataSize(8000, 5.0, 8000))
    phases = [RunPhase(name=name, key=name) for name in ("rollout", "score", "distill")]
    estimate = CostModel(larger, target, costs, "these models").estimate("lightning", phases)
    seconds = {phase.phase: phase.seconds for phase in estimate.phases}
    assert seconds["rollout"] == pytest.approx(SECONDS["generate"] * 1000)
    assert all("measured" in phase.basis for phase in estimate.phases if phase.phase in seconds and phase.flops)
    other = CostModel(larger, target, costs, "other models").estimate("lightning", phases)
    assert all("assumed" in phase.basis for phase in other.phases if phase.flops)
    live = CostModel(found.workload.live(), target, costs, "these models").estimate("live", phases[2:])
    assert live.phases[1].seconds == pytest.approx(overhead_of(found).methods[1].seconds, rel=1e-3)
