"""Two models measured before a run: every kind of work, and a diagnosis of whether the pair fits."""

from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.context import AssessInputs, Context
from opd_mcp.engine.stages.assess import judged, overlap
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.schemas.reports import Assessment, Estimate95, PairSide
from opd_mcp.schemas.resolve import resolve_recipe

SHORT = {
    "assess.rows": 8,
    "assess.sft_steps": 20,
    "assess.steps": 2,
    "sft.batch_size": 8,
    "distill.batch_size": 8,
}
WORK = ["answer", "generate", "score", "sft", "generate_live", "distill"]


def test_every_kind_of_work_is_measured_once_and_the_teacher_knows_the_student_better_after_sft(
    example: Path, tmp_path: Path
) -> None:
    recipe = resolve_recipe("demo", SHORT)
    inputs = AssessInputs(student=example / "student", teacher=example / "teacher", prompts=example / "eval.jsonl")
    found = stages.assess(recipe, inputs, tmp_path / "assessment", Context(recipe.runtime, recipe.prompting))
    assert [speed.work for speed in found.speeds] == WORK
    assert all(speed.tokens > 0 and speed.seconds > 0 for speed in found.speeds)
    assert (found.speed("sft").steps, found.speed("distill").steps) == (20, 2)
    assert set(found.load_seconds) == {"teacher", "student"}
    assert found.after.teacher_logprob > found.before.teacher_logprob + 1
    assert found.after.topk_overlap > found.before.topk_overlap
    assert found.teacher_accuracy is not None
    assert found.teacher_accuracy.value > 0.5
    assert found.before.accuracy is not None
    assert f"{found.after.topk_overlap:.0%} of the teacher's top {found.topk}" in found.diagnosis
    written = Assessment.from_json((tmp_path / "assessment" / "assessment.json").read_bytes())
    assert written == found
    lineage = verified_lineage(tmp_path / "assessment", full=True)
    assert lineage is not None
    assert {parent.role for parent in lineage.parents} == {"student", "teacher", "prompts"}


def side(overlapping: float, logprob: float = -0.5, right: tuple[float, float, float] | None = None) -> PairSide:
    return PairSide(
        teacher_logprob=logprob, own_logprob=-0.4, topk_overlap=overlapping, truncated=0.0, accuracy=estimate(right)
    )


def estimate(bounds: tuple[float, float, float] | None) -> Estimate95 | None:
    return None if bounds is None else Estimate95(value=bounds[0], low=bounds[1], high=bounds[2], samples=9, basis="")


@pytest.mark.parametrize(
    ("after", "cut", "teacher", "judgement", "said"),
    [
        (side(0.8), 0.0, None, "works", "should work"),
        (side(0.4), 0.0, None, "doubtful", "more SFT"),
        (side(0.8, logprob=-3.0), 0.0, None, "doubtful", "more SFT"),
        (side(0.1), 0.0, None, "fails", "hardly overlap"),
        (side(0.8), 0.9, None, "doubtful", "max_new_tokens"),
        (side(0.8, right=(0.9, 0.8, 1.0)), 0.0, (0.3, 0.2, 0.4), "fails", "nothing to teach"),
    ],
)
def test_the_diagnosis_follows_from_its_figures(after, cut, teacher, judgement, said) -> None:
    found, sentence = judged(side(0.3, logprob=-2.0), after, cut, estimate(teacher), 8)
    assert (found, said in sentence) == (judgement, True)
    assert f"{after.topk_overlap:.0%}" in sentence


def test_the_overlap_counts_shared_ids_wherever_they_stand() -> None:
    teacher, student = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[4, 9, 1, 0], [5, 6, 7, 8]])
    assert overlap(teacher, student) == pytest.approx((2 / 4 + 1) / 2)
    assert overlap(teacher[:0], student[:0]) == 0.0
