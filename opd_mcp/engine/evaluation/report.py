"""The report as a table that a person reads."""

from opd_mcp.grading.grade import answers_text
from opd_mcp.schemas.reports import BenchmarkReport, Estimate95, ModelScore


def report_markdown(report: BenchmarkReport) -> str:
    """Markdown: one row a model, paired differences, costs, and how each number was obtained."""
    lines = [
        "# Benchmark",
        "",
        f"{report.prompts} prompts, {report.prompts_with_answer} with an answer; seed {report.seed}; "
        f"{report.hardware}; recipe {report.recipe_hash[:12]}.",
        "",
        "| model | greedy accuracy | sampled accuracy | reverse KL, nats/token | mean tokens | truncated | EOS rate |",
        "|---|---|---|---|---|---|---|",
        *(_row(model) for model in report.models),
        "",
    ]
    lines += [
        f"{c.candidate} − {c.baseline}: accuracy {_interval(c.accuracy_difference, signed=True)} "
        f"({c.accuracy_difference.basis})."
        for c in report.comparisons
    ]
    if report.grader and report.prompts_with_answer:
        lines += ["", f"Answers graded by `{report.grader}`: {report.grader_reason}."]
        lines += [f"- {answers_text(model.name, model.answers)}" for model in report.models if model.answers]
    if report.teacher:
        lines += ["", f"Reverse KL to {report.teacher.label()}: {_kl_basis(report)}."]
    if report.teacher_mismatch_allowed:
        lines += ["", "**The SFT teacher and the distillation's teacher differ; this was allowed explicitly.**"]
    if report.alerts:
        lines += ["", "Alerts of the run:", ""]
        lines += [f"- {alert.time} `{alert.code}`: {' '.join(alert.message.split())}" for alert in report.alerts]
    lines += [line for warning in report.warnings for line in ("", f"Note: {warning}")]
    if report.costs:
        lines += ["", "| stage | seconds | tokens | tokens/s | device |", "|---|---|---|---|---|"]
        lines += [
            f"| {c.stage}{' (reused)' if c.reused else ''} | {c.seconds:.1f} | {c.tokens} "
            f"| {_number(c.tokens_per_second, '.0f')} | {c.device or ''} |"
            for c in report.costs
        ]
    return "\n".join(lines) + "\n"


def _row(model: ModelScore) -> str:
    return (
        f"| {model.name} | {_interval(model.greedy_accuracy)} | {_interval(model.sampled_accuracy)} "
        f"| {_interval(model.reverse_kl)} | {model.mean_response_tokens:.1f} | {model.truncated_fraction:.3f} "
        f"| {model.eos_rate:.3f} |"
    )


def _interval(estimate: Estimate95 | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _kl_basis(report: BenchmarkReport) -> str:
    return next((m.reverse_kl.basis for m in report.models if m.reverse_kl), "not measured")
