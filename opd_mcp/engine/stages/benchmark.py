"""Every model measured on the same prompts, and the report: `report.json`, and `report.md` that a person reads."""

from collections.abc import Mapping
from pathlib import Path

from opd_mcp.engine.context import BenchmarkInputs, Context
from opd_mcp.engine.evaluation.intervals import paired_difference
from opd_mcp.engine.evaluation.model_score import Measurement, Scored, score_model
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model, model_warnings
from opd_mcp.engine.provenance import Provenance, record_lineage
from opd_mcp.engine.runtime import hardware_name, open_runtime
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.grade import answers_text
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.consistency import vouched
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.schemas.identity import Parent
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import BenchmarkReport, Comparison, Estimate95, ModelScore


def benchmark(section: BenchmarkRecipe, inputs: BenchmarkInputs, output: Path, context: Context) -> BenchmarkReport:
    """Measure every model on the same prompts; the first is the candidate, the others its baselines.

    Writes report.json and report.md, with what earlier stages took and alerted.
    """
    runtime = open_runtime(context.runtime)
    rows = read_prompts(inputs.prompts)
    chosen = rows[: section.limit]
    grader_name, reason = recipe_grader(section, [row.answer for row in chosen if row.answer is not None])
    grader = grader_for(grader_name, pattern=section.answer_pattern, allow_code=section.allow_code)
    teacher = load_model(inputs.teacher, runtime) if inputs.teacher else None
    task = Measurement(section, chosen, grader, teacher, runtime, context)
    scored: dict[str, Scored] = {}
    warnings = model_warnings(context, teacher)
    for name, path in inputs.models.items():
        context.reporter.phase(f"measuring {name}")
        model = load_model(path, runtime, generates=True)
        warnings += model_warnings(context, model)
        with grader:
            scored[name] = score_model(name, model, adopt_tokenizer(path, context.prompting).eos_token_ids, task)
    candidate = next(iter(inputs.models))
    lineage = verified_lineage(inputs.models[candidate])
    claim = vouched(lineage.sft_teacher if lineage else None, made_here=context.made_here(inputs.models[candidate]))
    report = BenchmarkReport(
        recipe=section,
        seed=runtime.seed,
        prompts_sha256=prompts_hash(rows),
        prompts=len(chosen),
        prompts_with_answer=sum(row.answer is not None for row in chosen),
        grader=grader_name,
        grader_reason=reason,
        teacher=teacher.facts.identity if teacher else None,
        models=[entry.score for entry in scored.values()],
        comparisons=_comparisons(candidate, scored),
        hardware=hardware_name(runtime.device),
        recipe_hash=inputs.recipe_hash,
        teacher_mismatch_allowed=bool(lineage and lineage.teacher_mismatch_allowed),
        teacher_basis=claim.basis if claim else None,
        costs=list(inputs.costs),
        alerts=list(inputs.alerts),
        warnings=list(dict.fromkeys(warnings)),
    )
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "report.json", report.to_json(indent=2))
    write_atomic(output / "report.md", report_markdown(report))
    parents = [Parent(role=name, identity=entry.score.identity) for name, entry in scored.items()]
    parents.append(Parent(role="prompts", sha256=report.prompts_sha256))
    record_lineage(output, Provenance("report", "benchmark", section, parents, ["report.json", "report.md"]), context)
    return report


def _comparisons(candidate: str, scored: Mapping[str, Scored]) -> list[Comparison]:
    first = scored[candidate].greedy_correct
    return [
        Comparison(candidate=candidate, baseline=name, accuracy_difference=paired_difference(first, other))
        for name, entry in scored.items()
        if name != candidate and first is not None and (other := entry.greedy_correct) is not None
    ]


def report_markdown(report: BenchmarkReport) -> str:
    """Markdown: one row per model, paired differences, costs, and how each number was obtained."""
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
