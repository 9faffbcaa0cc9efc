"""The verdict on a run, made from its report alone: better, no different, worse or unknown, and why.

`verdict_of` is the only place that judges, so that status, report, page, dashboard and command line say the same.
`findings_of` are the report's own alerts: what the measurement shows to have gone wrong, each with the key to change.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opd_mcp.schemas.next_action import NextAction, next_call, plan_call
from opd_mcp.schemas.reports import BenchmarkReport, Judgement, ModelScore, Verdict
from opd_mcp.schemas.resolve import TOO_LOW
from opd_mcp.schemas.texts import duration, shortened

CAUSE_CHARACTERS = 400
# Fewer prompts can all be wrong by chance.
FEWEST_PROMPTS = 8
# A reverse KL that moved by less than this share has not moved; one below so many nats has no need to.
UNCHANGED_SHARE, SMALL_KL = 0.1, 0.05
# Shares of the candidate's responses that mark a collapse, where the baseline has clearly fewer.
COLLAPSED_SHARE, CLEARLY_MORE = 0.5, 0.25
SHRUNK, FLAT = 0.25, 0.1
# A student this far on the way to its teacher has little to gain from another round.
GAP_DONE = 0.9
GRADING = frozenset({"benchmark_zero", "teacher_often_wrong", "responses_not_graded"})
GRADER_KEYS = "'benchmark.grader' and 'benchmark.answer_pattern'"
HOW: dict[Judgement, str] = {
    "better": "is better than",
    "worse": "is worse than",
    "no_difference": "shows no difference beyond chance to",
}
RATES = ("learning_rate_far", "preset_rates")
# Alerts of the training that explain a bad result, the deepest cause first.
TRAINING_ALERTS = (
    "teacher_often_wrong",
    "learning_rate_far",
    "preset_rates",
    "few_steps",
    "sft_undertrained",
    "step_skipped",
    "advantages_clipped",
    "rollouts_stale",
)


@dataclass(frozen=True)
class Cause:
    """What went wrong: the code of its alert, a sentence with the evidence, and the key to change."""

    code: str
    message: str
    fix: str = ""

    @property
    def text(self) -> str:
        """Both in one."""
        return f"{self.message} {self.fix}".strip()


@dataclass(frozen=True)
class Gain:
    """The candidate minus its baseline in one measure, with a 95 % interval; less is better for a reverse KL."""

    measure: str
    before: float
    after: float
    change: tuple[float, float, float]
    less_is_better: bool = False

    @property
    def judgement(self) -> Judgement:
        """Better or worse beyond chance, or no difference."""
        _, low, high = self.change
        if low <= 0 <= high:
            return "no_difference"
        return "better" if (low > 0) != self.less_is_better else "worse"

    def text(self) -> str:
        """Both values and their difference."""
        value, low, high = self.change
        return f"{self.measure} {self.after:.3f} against {self.before:.3f}, {value:+.3f} [{low:+.3f}, {high:+.3f}]" + (
            " (lower is better; accuracy was not measured)" if self.less_is_better else ""
        )


def verdict_of(report: BenchmarkReport) -> Verdict:
    """The verdict on the report's first model against the first other one that is not the teacher."""
    candidate, baseline = report.models[0], baseline_of(report)
    gain = gain_of(report)
    causes = [] if gain is not None and gain.judgement == "better" else causes_of(report)
    judgement: Judgement = gain.judgement if gain else "unknown"
    if baseline is None:
        sentence = f"{_alone(report, candidate)} and was compared with no other student"
    elif gain is None:
        sentence = f"{candidate.name} and {baseline.name} were measured by nothing that both have"
    else:
        sentence = f"{candidate.name} {HOW[judgement]} {baseline.name}: {gain.text()}"
        if judgement == "no_difference" and not gain.less_is_better:
            if went_away := _went_away(report, candidate, baseline):
                # What a distillation is for has failed, though no answer shows it yet.
                judgement = "worse"
                sentence = f"{candidate.name} {HOW[judgement]} {baseline.name}: {went_away}; {gain.text()}"
            elif divergence := _divergence(candidate, baseline):
                sentence += f"; {divergence}"
    if causes and causes[0].code == "benchmark_zero":
        judgement, sentence = "unknown", f"nothing can be said of {candidate.name}: no model has one right answer"
    elif baseline is not None:
        sentence += _gap_text(report, baseline)
    return Verdict(
        judgement=judgement,
        sentence=f"{sentence}; {_cost_text(report)}.",
        cause=" ".join(shortened(cause.text, CAUSE_CHARACTERS) for cause in causes[:2]) or None,
        causes=[cause.code for cause in causes[:2]] or None,
        next_action=_next_action(report, judgement, causes),
    )


def baseline_of(report: BenchmarkReport) -> ModelScore | None:
    """What the candidate must beat: the first other model that is not the teacher."""
    return next((model for model in report.models[1:] if model.name != report.teacher_row), None)


def gain_of(report: BenchmarkReport) -> Gain | None:
    """The gain in accuracy, else in the first metric of a task, else in reverse KL; None where nothing compares."""
    candidate, baseline = report.models[0], baseline_of(report)
    if baseline is None:
        return None
    pair = next((pair for pair in report.comparisons if pair.baseline == baseline.name), None)
    if pair is not None and candidate.greedy_accuracy and baseline.greedy_accuracy:
        difference = pair.accuracy_difference
        change = (difference.value, difference.low, difference.high)
        return Gain("accuracy", baseline.greedy_accuracy.value, candidate.greedy_accuracy.value, change)
    for name, after in (candidate.task_metrics or {}).items():
        before = (baseline.task_metrics or {}).get(name)
        bounds = (after.low, after.high, before.low, before.high) if before else (None,)
        if before is not None and None not in bounds:
            low, high, other_low, other_high = (float(bound or 0.0) for bound in bounds)
            change = _difference((after.value, low, high), (before.value, other_low, other_high))
            return Gain(name, before.value, after.value, change)
    return _divergence_gain(candidate, baseline)


def _divergence_gain(candidate: ModelScore, baseline: ModelScore) -> Gain | None:
    mine, others = candidate.reverse_kl, baseline.reverse_kl
    if mine is None or others is None:
        return None
    change = _difference((mine.value, mine.low, mine.high), (others.value, others.low, others.high))
    return Gain("reverse KL", others.value, mine.value, change, less_is_better=True)


def causes_of(report: BenchmarkReport) -> list[Cause]:
    """What explains a result that is not better, the deepest cause first."""
    told: dict[str, str] = {}
    for alert in report.alerts:  # the rates of both trainings, of others the last word
        before = told.get(alert.code, "") if alert.code in RATES else ""
        told[alert.code] = before if alert.message in before else f"{before} {alert.message}".strip()
    found = list(findings_of(report))
    zero = [cause for cause in found if cause.code == "benchmark_zero"]
    training = [Cause(code, " ".join(told[code].split())) for code in TRAINING_ALERTS if code in told]
    measured = [cause for cause in found if cause not in zero and cause.code not in told]
    if has_collapsed(report):  # a higher rate, or more room for what does not end, helps no such student
        return [*zero, *(cause for cause in training if TOO_LOW not in cause.message), *measured]
    cut = [Cause("answers_truncated", note) for note in report.warnings if note.startswith("Responses cut at ")]
    return [*zero, *training, *measured, *cut]


def has_collapsed(report: BenchmarkReport) -> bool:
    """Whether the report's findings name a collapse."""
    return any(cause.code == "collapse" for cause in findings_of(report))


def findings_of(report: BenchmarkReport) -> Iterator[Cause]:
    """`benchmark_zero`, `collapse`, `sft_undertrained` and `no_learning`, as the measurements show them."""
    candidate, baseline = report.models[0], baseline_of(report)
    gain = gain_of(report)
    if _is_zero(report):
        yield Cause("benchmark_zero", *_zero_texts(report))
    elif baseline is not None and gain is not None and gain.judgement != "better":
        stage = trained_stage(report)
        rate = f"'{stage}.optimizer.learning_rate'" if stage else "the learning rate of its training"
        look = ", and look at the responses that it learnt from" if stage == "sft" else ""
        if signs := _collapse(candidate, baseline):
            fix = f"Lower {rate} to a tenth{look}."
            yield Cause("collapse", f"{candidate.name} has collapsed: {'; '.join(signs)}.", fix)
        elif _learnt_nothing_usable(report, candidate, baseline):
            yield Cause(
                "sft_undertrained",
                f"Neither {candidate.name} nor {baseline.name} has one right answer, and the teacher has: the student "
                "has not learnt the task.",
                "Raise 'sft.steps' four times, or begin with a pretrained student.",
            )
        closed = any(gap.share and gap.share.low > 0 for gap in report.gap_closed if gap.baseline == baseline.name)
        if stage == "distill" and not closed and (divergence := _unchanged(candidate, baseline)):
            yield Cause(
                "no_learning",
                f"The distillation changed nothing: {divergence}.",
                "Raise 'distill.steps' four times.",
            )


def trained_stage(report: BenchmarkReport) -> str | None:
    """The last training of the run that made the report; None for a benchmark of models that are there."""
    stages = {cost.stage for cost in report.costs}
    return next((stage for stage in ("distill", "sft") if stage in stages), None)


def _is_zero(report: BenchmarkReport) -> bool:
    accuracies = [model.greedy_accuracy for model in report.models if model.greedy_accuracy]
    return bool(accuracies) and all(
        accuracy.value == 0 and accuracy.samples >= FEWEST_PROMPTS for accuracy in accuracies
    )


def _zero_texts(report: BenchmarkReport) -> tuple[str, str]:
    measured = [model for model in report.models if model.greedy_accuracy]
    unread = [
        f"{model.name} {model.answers.without_answer} of {model.answers.responses}"
        for model in measured
        if model.answers
    ]
    teacher = ", the teacher neither" if any(model.name == report.teacher_row for model in measured) else ""
    pattern = f" with the pattern `{report.recipe.answer_pattern}`" if report.grader == "regex" else ""
    return (
        f"Of {len(measured)} models none has one right answer{teacher}: look at the grader `{report.grader}`{pattern}. "
        f"Responses in which it found no answer: {', '.join(unread)}.",
        f"Change {GRADER_KEYS}, or the expected answers.",
    )


def _collapse(candidate: ModelScore, baseline: ModelScore) -> list[str]:
    """The signs of a collapse that the candidate has and its baseline has not."""
    signs = []
    shares = (
        ("are empty", _empty_share(candidate), _empty_share(baseline)),
        ("run into the length limit", candidate.truncated_fraction, baseline.truncated_fraction),
        ("end in a repeated phrase", candidate.repeated_fraction, baseline.repeated_fraction),
    )
    for what, mine, others in shares:
        if mine is not None and mine >= COLLAPSED_SHARE and mine >= (others or 0.0) + CLEARLY_MORE:
            signs.append(f"{mine:.0%} of its responses {what} ({others or 0:.0%} of {baseline.name}'s)")
    mine, others = candidate.mean_response_tokens, baseline.mean_response_tokens
    # A baseline that never learnt to stop is no measure of length.
    stops = (baseline.truncated_fraction or 0.0) < COLLAPSED_SHARE
    if mine is not None and others is not None and stops and mine < SHRUNK * others:
        signs.append(f"its responses have {mine:.3g} tokens ({baseline.name}'s {others:.3g})")
    mine, others = candidate.entropy, baseline.entropy
    if mine is not None and others is not None and mine < FLAT * others and not _came_closer(candidate, baseline):
        signs.append(f"its entropy is {mine:.2g} nats per token ({baseline.name}'s {others:.2g})")
    return signs


def _empty_share(model: ModelScore) -> float | None:
    return model.answers.empty / model.answers.responses if model.answers and model.answers.responses else None


def _came_closer(candidate: ModelScore, baseline: ModelScore) -> bool:
    mine, others = candidate.reverse_kl, baseline.reverse_kl
    return mine is not None and others is not None and mine.value < others.value


def _learnt_nothing_usable(report: BenchmarkReport, candidate: ModelScore, baseline: ModelScore) -> bool:
    teacher = next((model for model in report.models if model.name == report.teacher_row), None)
    right = [
        model.greedy_accuracy.value if model and model.greedy_accuracy else None for model in (candidate, baseline)
    ]
    taught = teacher.greedy_accuracy.value if teacher and teacher.greedy_accuracy else 0.0
    return right == [0.0, 0.0] and taught > 0


def _unchanged(candidate: ModelScore, baseline: ModelScore) -> str | None:
    """That the reverse KL on fresh samples is what it was; None where it moved, or was small before."""
    mine, others = candidate.reverse_kl, baseline.reverse_kl
    if mine is None or others is None or others.value < SMALL_KL:
        return None
    moved = abs(mine.value - others.value) > UNCHANGED_SHARE * others.value
    return None if moved else _divergence(candidate, baseline)


def _divergence(candidate: ModelScore, baseline: ModelScore) -> str | None:
    mine, others = candidate.reverse_kl, baseline.reverse_kl
    if mine is None or others is None:
        return None
    return f"the reverse KL of fresh samples is {mine.value:.3g} nats per token, {baseline.name}'s {others.value:.3g}"


def _difference(mine: tuple[float, float, float], others: tuple[float, float, float]) -> tuple[float, float, float]:
    """The difference of two independent estimates (value, low, high), its interval by MOVER (Zou and Donner 2008)."""
    (value, low, high), (other, other_low, other_high) = mine, others
    change = value - other
    return (
        change,
        change - math.hypot(value - low, other_high - other),
        change + math.hypot(high - value, other - other_low),
    )


def _alone(report: BenchmarkReport, candidate: ModelScore) -> str:
    if candidate.greedy_accuracy:
        found = candidate.greedy_accuracy
        return f"{candidate.name} has an accuracy of {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    metrics = [f"{name} {metric.value:.3f}" for name, metric in list((candidate.task_metrics or {}).items())[:2]]
    if metrics:
        return f"{candidate.name} has {', '.join(metrics)}"
    if candidate.reverse_kl:
        return f"{candidate.name} has a reverse KL of {candidate.reverse_kl.value:.3f} nats per token"
    return f"{candidate.name} was sampled on {report.prompts} prompts"


def _went_away(report: BenchmarkReport, candidate: ModelScore, baseline: ModelScore) -> str | None:
    """That a distillation ended farther from its teacher, beyond chance and by more than a tenth; None otherwise."""
    gain = _divergence_gain(candidate, baseline)
    if gain is None or trained_stage(report) != "distill" or gain.judgement != "worse":
        return None
    return _divergence(candidate, baseline) if gain.change[0] > UNCHANGED_SHARE * gain.before else None


def _gap_text(report: BenchmarkReport, baseline: ModelScore) -> str:
    gap = next((gap for gap in report.gap_closed if gap.baseline == baseline.name), None)
    if gap is None or gap.share is None:
        return ""
    share = gap.share
    measure = " in sampled accuracy" if share.basis.startswith("sampled") else ""
    return f"; {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of the gap to {gap.teacher} closed{measure}"


def _cost_text(report: BenchmarkReport) -> str:
    """What the run took: its own stages and the measurement; what earlier runs had made is named apart."""
    seconds = sum(cost.seconds for cost in report.costs if not cost.reused)
    seconds += sum(model.seconds for model in report.models)
    reused = sum(cost.seconds for cost in report.costs if cost.reused)
    earlier = f", and reused what had taken {duration(reused)}" if reused else ""
    what = "it" if trained_stage(report) else "measuring"
    return f"{what} took {duration(seconds)} ({seconds / 3600:.2g} device hours){earlier}"


def _next_action(report: BenchmarkReport, judgement: Judgement, causes: list[Cause]) -> NextAction:
    """The next step; the view that knows the run fills in its arguments."""
    stage = trained_stage(report)
    if stage is not None and judgement == "better":
        return _after_gain(report, stage)
    if causes and causes[0].code in GRADING:
        why = f"Resolve {causes[0].code}: change {GRADER_KEYS}, look at the responses in the report, and measure again."
        return next_call("benchmark_student", why, missing=("model", "prompts", "overrides"))
    if stage is None:
        return NextAction(why="Read the report: it has the samples of every model.")
    if causes:
        return plan_call(f"Resolve {causes[0].code} as the cause says, and plan again with that change.")
    change = f"a third of '{stage}.optimizer.learning_rate'" if judgement == "worse" else f"twice '{stage}.steps'"
    return plan_call(f"Look at the report's curves and samples; then plan again with {change}.")


def _after_gain(report: BenchmarkReport, stage: str) -> NextAction:
    if stage == "sft":
        why = "The SFT student is ready; its teacher cache comes next."
        return next_call("build_teacher_cache", why, missing=("student", "teacher", "prompts"))
    gap = next((gap.share for gap in report.gap_closed if gap.share), None)
    if gap is not None and gap.value >= GAP_DONE:
        return NextAction(why="Use the student; `paths` has its directory.")
    return plan_call("Use the student, or distill once more from it: a second round.")
