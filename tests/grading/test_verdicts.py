"""Verdicts: what a report's data is called, in one sentence, with the cause and the key to change."""

import pytest

from opd_mcp.grading.verdicts import findings_of, verdict_of
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import (
    BenchmarkReport,
    Comparison,
    Estimate95,
    GapClosed,
    GradedAnswers,
    ModelScore,
    StageCost,
    TaskMetric,
)
from opd_mcp.schemas.resolve import TOO_LOW
from opd_mcp.schemas.runs import Alert

IDENTITY = ModelIdentity(name="m", weights="0" * 64, tokenizer="0" * 64, special_tokens="0" * 64)


def estimate(value: float, half: float = 0.05, samples: int = 100) -> Estimate95:
    return Estimate95(value=value, low=value - half, high=value + half, samples=samples, basis="made up")


def model(name: str, accuracy: float | None = None, kl: float | None = None, **fields) -> ModelScore:
    return ModelScore(
        name=name,
        identity=IDENTITY,
        greedy_accuracy=None if accuracy is None else estimate(accuracy),
        reverse_kl=None if kl is None else estimate(kl),
        **{"mean_response_tokens": 20.0, "truncated_fraction": 0.0, "seconds": 6.0, "tokens": 10, **fields},
    )


def report(
    *models: ModelScore, change: float | None = None, stage: str | None = "distill", alerts=(), **fields
) -> BenchmarkReport:
    """`change` is the paired difference of the first two models, ± 0.05."""
    pairs = (
        [Comparison(candidate=models[0].name, baseline=models[1].name, accuracy_difference=estimate(change))]
        if (change is not None)
        else []
    )
    return BenchmarkReport(
        recipe=BenchmarkRecipe(),
        seed=0,
        prompts_sha256="0" * 64,
        prompts=100,
        prompts_with_answer=100,
        grader="number",
        models=list(models),
        teacher_row="teacher" if any(each.name == "teacher" for each in models) else None,
        comparisons=pairs,
        hardware="cpu",
        recipe_hash="0" * 64,
        costs=[] if stage is None else [StageCost(stage=stage, seconds=3588.0)],
        alerts=[Alert(time="2026-08-01T10:00:00Z", code=code, message=message) for code, message in alerts],
        **fields,
    )


STUDENTS = model("distilled", 0.8, 0.1), model("sft", 0.4, 0.5)
TEACHER = model("teacher", 0.95)


def test_a_gain_has_its_interval_the_share_of_the_gap_the_cost_and_a_second_round_as_next_step():
    gap = GapClosed(candidate="distilled", baseline="sft", teacher="teacher", share=estimate(0.7))
    verdict = verdict_of(report(*STUDENTS, TEACHER, change=0.4, gap_closed=[gap]))
    assert (verdict.judgement, verdict.cause) == ("better", None)
    assert verdict.sentence == (
        "distilled is better than sft: accuracy 0.800 against 0.400, +0.400 [+0.350, +0.450]; "
        "70% [65%, 75%] of the gap to teacher closed; it took 60.1 min (1 device hours)."
    )
    assert verdict.next_action.tool == "plan_distillation"
    assert "second round" in verdict.next_action.why


def test_what_earlier_runs_had_made_is_no_cost_of_this_one():
    again = report(*STUDENTS, change=0.4)
    costs = [StageCost(stage="sft", seconds=60.0, reused=True), StageCost(stage="distill", seconds=8.0)]
    sentence = verdict_of(again.model_copy(update={"costs": costs})).sentence
    assert sentence.endswith("it took 20 s (0.0056 device hours), and reused what had taken 60 s.")


@pytest.mark.parametrize(("change", "judgement"), [(-0.2, "worse"), (0.02, "no_difference"), (-0.04, "no_difference")])
def test_a_loss_is_called_worse_and_what_is_within_chance_no_difference(change, judgement):
    verdict = verdict_of(report(*STUDENTS, change=change))
    assert verdict.judgement == judgement
    assert verdict.text().startswith(judgement.replace("_", " ").upper())
    change = "a third of 'distill.optimizer.learning_rate'" if judgement == "worse" else "twice 'distill.steps'"
    assert verdict.next_action.why.endswith(f"then plan again with {change}.")


def test_a_distillation_that_ends_farther_from_its_teacher_is_worse_though_no_answer_shows_it():
    away = model("distilled", 0.4, 0.9), model("sft", 0.4, 0.5)
    verdict = verdict_of(report(*away, change=0.0))
    assert verdict.judgement == "worse"
    assert "the reverse KL of fresh samples is 0.9 nats per token, sft's 0.5; accuracy 0.400" in verdict.sentence
    assert verdict_of(report(*away, change=0.2)).judgement == "better", "the answers count first"
    assert verdict_of(report(*away, change=0.0, stage=None)).judgement == "no_difference"


def test_the_teacher_is_no_baseline():
    only = verdict_of(report(model("student", 0.4), TEACHER, change=-0.5, stage=None))
    assert only.judgement == "unknown"
    assert "student has an accuracy of 0.400 [0.350, 0.450] and was compared with no other student" in only.sentence


def test_without_answers_the_reverse_kl_judges_and_says_so():
    near = verdict_of(report(model("distilled", kl=0.1), model("sft", kl=0.5)))
    assert near.judgement == "better"
    assert "reverse KL 0.100 against 0.500, -0.400 [-0.471, -0.329] (lower is better; accuracy" in near.sentence
    assert verdict_of(report(model("distilled", kl=0.9), model("sft", kl=0.5))).judgement == "worse"


def test_a_task_is_judged_by_its_first_metric():
    def scored(name: str, value: float) -> ModelScore:
        metric = TaskMetric(value=value, low=value - 0.03, high=value + 0.04, samples=50)
        return model(name, task_metrics={"acc": metric})

    assert verdict_of(report(scored("a", 0.7), scored("b", 0.5), stage=None)).judgement == "better"
    assert verdict_of(report(scored("a", 0.5), scored("b", 0.52), stage=None)).judgement == "no_difference"


def test_zero_everywhere_is_about_the_grader_whatever_the_intervals_say():
    unread = GradedAnswers(responses=100, without_answer=100)
    zero = [model(name, 0.0, answers=unread) for name in ("distilled", "sft", "teacher")]
    verdict = verdict_of(report(*zero, change=0.0))
    assert verdict.judgement == "unknown"
    assert "none has one right answer, the teacher neither: look at the grader `number`" in verdict.cause
    assert "'benchmark.grader'" in verdict.cause
    assert verdict.next_action.tool == "benchmark_student"
    assert "overrides" in verdict.next_action.missing, "the same call again would find no answer either"
    few = [each.model_copy(update={"greedy_accuracy": estimate(0.0, samples=4)}) for each in zero]
    assert [cause.code for cause in findings_of(report(*few, change=0.0))] == [], "four prompts can all be wrong"


@pytest.mark.parametrize(
    ("candidate", "sign"),
    [
        ({"truncated_fraction": 0.9}, "90% of its responses run into the length limit"),
        ({"repeated_fraction": 0.6}, "60% of its responses end in a repeated phrase"),
        ({"answers": GradedAnswers(responses=10, without_answer=8, empty=8)}, "80% of its responses are empty"),
        ({"mean_response_tokens": 2.0}, "its responses have 2 tokens (sft's 20)"),
        ({"entropy": 0.01}, "its entropy is 0.01 nats per token (sft's 1)"),
    ],
)
def test_a_collapse_is_named_by_its_signs_with_the_key_to_change(candidate, sign):
    worse = report(model("distilled", 0.1, 2.0, **candidate), model("sft", 0.4, 0.5, entropy=1.0), change=-0.3)
    [cause] = findings_of(worse)
    assert cause.code == "collapse"
    assert sign in cause.message
    assert "'distill.optimizer.learning_rate'" in cause.fix
    better = worse.model_copy(update={"comparisons": report(*STUDENTS, change=0.3).comparisons})
    assert list(findings_of(better)) == [], "a student that gained has not collapsed"


def test_a_collapse_asks_for_no_more_room_and_no_higher_rate():
    endless = model("distilled", 0.1, 2.0, truncated_fraction=0.9)
    low = ("learning_rate_far", f"'distill.optimizer.learning_rate' {TOO_LOW}0.0001, 1/30 of the 0.003. Set it.")
    note = "Responses cut at 64 tokens: 90% of distilled. Raise 'benchmark.sampling.max_new_tokens'."
    against = model("sft", 0.4, 0.5)
    verdict = verdict_of(report(endless, against, change=-0.3, alerts=[low], warnings=[note]))
    assert verdict.causes == ["collapse"]
    assert verdict.cause.endswith("Lower 'distill.optimizer.learning_rate' to a tenth.")
    cut = model("distilled", 0.3, 0.6, truncated_fraction=0.2)
    assert verdict_of(report(cut, against, change=-0.1, alerts=[low], warnings=[note])).causes == [
        "learning_rate_far",
        "answers_truncated",
    ]


def test_a_student_that_learnt_to_stop_has_not_collapsed():
    base = model("base", 0.02, 3.0, truncated_fraction=1.0, mean_response_tokens=64.0, entropy=3.0)
    student = model("sft", 0.02, 1.0, mean_response_tokens=8.0, entropy=0.2)
    assert list(findings_of(report(student, base, change=0.0, stage="sft"))) == []


def test_a_reverse_kl_that_stays_is_no_learning():
    [cause] = findings_of(report(model("distilled", 0.4, 0.49), model("sft", 0.4, 0.5), change=0.0))
    assert cause.code == "no_learning"
    assert "'distill.steps'" in cause.fix
    gap = GapClosed(candidate="distilled", baseline="sft", teacher="teacher", share=estimate(0.2))
    gained = report(model("distilled", 0.4, 0.49), model("sft", 0.4, 0.5), change=0.0, gap_closed=[gap])
    assert list(findings_of(gained)) == [], "its sampled answers are better"
    small = report(model("distilled", 0.4, 0.04), model("sft", 0.4, 0.041), change=0.0)
    assert list(findings_of(small)) == [], "there is nothing left to learn"
    assert list(findings_of(report(model("a", 0.4, 0.49), model("b", 0.4, 0.5), change=0.0, stage=None))) == []


def test_students_without_one_right_answer_whose_teacher_has_many_are_undertrained():
    nothing = report(model("distilled", 0.0, 2.0), model("sft", 0.0, 3.0), TEACHER, change=0.0)
    assert [cause.code for cause in findings_of(nothing)] == ["sft_undertrained"]


def test_the_deepest_cause_comes_first_and_the_collapse_after_it():
    far = ("learning_rate_far", "'distill.optimizer.learning_rate' is 0.3. Set it to about 0.003.")
    collapsed = model("distilled", 0.0, 9.0, truncated_fraction=1.0)
    verdict = verdict_of(report(collapsed, model("sft", 0.4, 0.5), TEACHER, change=-0.4, alerts=[far]))
    assert verdict.judgement == "worse"
    assert verdict.cause.startswith(f"{far[1]} distilled has collapsed: 100% of its responses run into")
    assert "learning_rate_far" in verdict.next_action.why
    assert verdict_of(report(*STUDENTS, change=0.4, alerts=[far])).cause is None
