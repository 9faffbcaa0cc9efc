"""Every model measured on the same prompts, and the report: `report.json`; for people `report.md` and `report.html`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.engine.context import BenchmarkInputs, Context
from opd_mcp.engine.data.encoding import context_of
from opd_mcp.engine.evaluation.intervals import gap_closed, paired_difference
from opd_mcp.engine.evaluation.model_score import Measurement, Scored, asked, quantisation_kl, score_model
from opd_mcp.engine.evaluation.report_page import report_page
from opd_mcp.engine.generation.served import engine_wish, opened_generator
from opd_mcp.engine.models.loading import LoadedModel, adopt_tokenizer, load_model, model_warnings
from opd_mcp.engine.provenance import Provenance, engines_of, record_lineage, trained_adapter, training_of
from opd_mcp.engine.runtime import Runtime, hardware_name, open_runtime
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.grading.verdicts import findings_of, has_collapsed, verdict_of
from opd_mcp.identity.consistency import vouched
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow, prompts_hash
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.identity.panels import full_panel
from opd_mcp.identity.tokenizers import chat_template, reads_clock
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.identity import ModelIdentity, Parent
from opd_mcp.schemas.recipes import BenchmarkRecipe, is_url
from opd_mcp.schemas.reports import (
    BenchmarkReport,
    Comparison,
    Estimate95,
    GapClosed,
    ModelScore,
    QuantisationCost,
    ShownAnswers,
)
from opd_mcp.schemas.texts import shortened

# A tenth of the answers cut short moves an accuracy by more than its interval.
TRUNCATED_SHARE = 0.1
PROMPT_CHARACTERS, ANSWER_CHARACTERS, RESPONSE_CHARACTERS = 600, 200, 800
TEMPLATE_CHARACTERS, HEADING_CHARACTERS = 400, 200


def benchmark(section: BenchmarkRecipe, inputs: BenchmarkInputs, output: Path, context: Context) -> BenchmarkReport:
    """Measure every model on the same prompts; the first is the candidate, the others its baselines.

    Writes report.json, report.md and report.html, with what earlier stages took and alerted. Alerts of
    `grading/verdicts.py` are raised at the end, as `answers_truncated` is.
    """
    runtime = open_runtime(context.runtime)
    rows = read_prompts(inputs.prompts)
    chosen = [asked(row, section.prompt_template) for row in rows[inputs.skipped :][: section.limit]]
    grader_name, reason = recipe_grader(section, [row.answer for row in chosen if row.answer is not None])
    grader = grader_for(grader_name, pattern=section.answer_pattern, allow_code=section.allow_code)
    answered = sum(row.answer is not None for row in chosen)
    references = inputs.references if answered else {}
    teacher, references, warnings = _teacher_and_references(inputs.teacher, references, runtime)
    task = Measurement(section, chosen, grader, teacher, runtime, context, inputs.teachers)
    scored: dict[str, Scored] = {}
    warnings += model_warnings(context, teacher)
    models = {**inputs.models, **references}
    pair = _quantised_pair(inputs)
    places: dict[str, Path | ModelFacts] = {**models, **(pair.missing if pair else {})}
    for name, place in places.items():
        path = place.path if isinstance(place, ModelFacts) else place
        context.reporter.phase(f"measuring {name}")
        # As a row of its own the teacher has no reverse KL; one that the caller names as a model has: about 0.
        itself = teacher is not None and name in references and path == inputs.teacher
        model = teacher if teacher is not None and itself else load_model(place, runtime, generates=True)
        warnings += model_warnings(context, model)
        stops = adopt_tokenizer(path, context.prompting).eos_token_ids
        # An adapter, which engines do not load, is measured here; so is every baseline of a server with one model.
        engine = section.engine if serves(section.engine, name == next(iter(models)), model) else None
        if engine != section.engine:
            warnings.append(f"{name} answered here, not on the engine that 'benchmark.engine' names.")
        room = context.prompting.max_prompt_tokens + section.sampling.max_new_tokens
        wish = engine_wish(engine, model, room, context)
        with grader, opened_generator(wish, model, section.batch_size, context) as generator:
            scored[name] = score_model(name, model, stops, task, generator, as_teacher=itself)
        del model  # it would be in memory together with the next one
    # A base model that was not fine-tuned often does not stop: its row is a mark, not a measurement of the limit.
    marks = {name for name, path in references.items() if path != inputs.teacher}
    judged = [entry.score for name, entry in scored.items() if name not in marks]
    candidate = next(iter(inputs.models))
    teacher_row = next((name for name, path in reversed(models.items()) if path == inputs.teacher), None)
    lineage = verified_lineage(inputs.models[candidate])
    claim = vouched(lineage.sft_teacher if lineage else None, made_here=context.made_here(inputs.models[candidate]))
    report = BenchmarkReport(
        run=inputs.run,
        recipe=section,
        suite=inputs.suite,
        suite_changes=dict(inputs.suite_changes),
        seed=runtime.seed,
        prompts_sha256=prompts_hash(rows),
        prompts=len(chosen),
        prompts_with_answer=answered,
        grader=grader_name,
        grader_reason=reason,
        teacher=_teacher_identity(teacher, inputs, rows, context),
        teacher_row=teacher_row,
        models=[entry.score for entry in scored.values()],
        comparisons=_comparisons(candidate, scored),
        gap_closed=_gaps(candidate, teacher_row, scored),
        quantisation=_quantisation_cost(pair, scored, task) if pair else None,
        not_measured=dict(inputs.not_measured) if answered else {},
        adapters={name: made for name, path in models.items() if (made := trained_adapter(path)) is not None},
        repairs={name: told.repair for name, path in models.items() if (told := training_of(path)) and told.repair},
        teacher_responses=inputs.teacher_responses,
        hardware=hardware_name(runtime.device),
        recipe_hash=inputs.recipe_hash,
        teacher_mismatch_allowed=bool(lineage and lineage.teacher_mismatch_allowed),
        teacher_basis=claim.basis if claim else None,
        costs=list(inputs.costs),
        alerts=list(inputs.alerts),
        warnings=list(dict.fromkeys(warnings)),
        planned_seconds=dict(inputs.planned_seconds),
        curves=list(inputs.curves),
        samples=shown_answers(chosen, scored),
    )
    # A collapsed student's responses have no end that more room would show.
    endless = {candidate} if has_collapsed(report) else set()
    cut = truncation_warnings([score for score in judged if score.name not in endless], section)
    found = [(cause.code, cause.text) for cause in findings_of(report)]
    report = report.model_copy(update={"warnings": [*report.warnings, *cut, *(message for _, message in found)]})
    report = report.model_copy(update={"verdict": verdict_of(report)})
    write_report(report, output, context, models.values())
    # last, so that a client that waits for the run is not woken twice
    for code, message in [*(("answers_truncated", message) for message in cut), *found]:
        context.reporter.alert(code, message)
    return report


def _teacher_identity(
    teacher: LoadedModel | None, inputs: BenchmarkInputs, rows: Sequence[PromptRow], context: Context
) -> ModelIdentity | None:
    if teacher is None and not inputs.teachers:
        return None
    identity = teacher.facts.identity if teacher else full_panel(inputs.teachers)
    return identity.model_copy(update={"context": context_of(rows, context.prompting)})


def serves(engine: str | None, candidate: bool, model: LoadedModel) -> bool:
    """Whether an engine answers for a model: a user's server only for the candidate, none for an adapter or 4 bits."""
    as_stored = model.facts.adapter is None and model.facts.identity.quantization is None
    return engine is not None and as_stored and (candidate or not is_url(engine))


def write_report(report: BenchmarkReport, output: Path, context: Context, models: Iterable[Path]) -> None:
    """Write the report's three forms and the lineage; `models` are the directories whose templates were used."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "report.json", report.to_json(indent=2))
    write_atomic(output / "report.md", report_markdown(report))
    write_atomic(output / "report.html", report_page(report))
    parents = [Parent(role=score.name, identity=score.identity) for score in report.models]
    parents.append(Parent(role="prompts", sha256=report.prompts_sha256))
    made = Provenance("report", "benchmark", report.recipe, parents, ["report.json", "report.md", "report.html"])
    dated = any(reads_clock(chat_template(path)) for path in models)
    answered = next((score.generated_by for score in report.models if score.generated_by is not None), None)
    record_lineage(
        output,
        made,
        context,
        rendered_at=context.rendered_at.isoformat() if dated else None,
        engines=engines_of(benchmark=answered),
    )


def _teacher_and_references(
    path: Path | None, references: Mapping[str, Path], runtime: Runtime
) -> tuple[LoadedModel | None, Mapping[str, Path], list[str]]:
    """The teacher, the references that can be measured, and why one cannot: some teachers can only score."""
    if path is None:
        return None, references, []
    generates = path in references.values()
    try:
        return load_model(path, runtime, generates=generates), references, []
    except PathError as error:
        if not generates or error.code != "unsupported_model":
            raise
        others = {name: other for name, other in references.items() if other != path}
        return load_model(path, runtime), others, [f"The teacher's accuracy is not measured. {error.message}"]


@dataclass(frozen=True)
class _QuantisedPair:
    """One student with its linear layers in 4 bits and without, by the names of their rows; `missing` is one."""

    names: tuple[str, str]
    quantised: ModelFacts
    plain: ModelFacts
    missing: Mapping[str, ModelFacts]


def _quantised_pair(inputs: BenchmarkInputs) -> _QuantisedPair | None:
    """The student that the run's training began with, else the candidate, where it is or was held in 4 bits."""
    for name in [*inputs.forms, next(iter(inputs.models))]:
        path, form = inputs.models[name], inputs.forms.get(name, "as_saved")
        trained = inspect_model(path, form=form)
        if (quantization := trained.identity.quantization) is None:
            continue
        plain = inspect_model(path, form="plain")
        if inspect_model(path).identity.quantization is not None:
            other = f"{name}, not quantised"
            return _QuantisedPair((name, other), trained, plain, {other: plain})
        other = f"{name}, {quantization}"
        return _QuantisedPair((other, name), trained, plain, {other: trained})
    return None


def _quantisation_cost(pair: _QuantisedPair, scored: Mapping[str, Scored], task: Measurement) -> QuantisationCost:
    quantised, plain = (scored[name].greedy_correct for name in pair.names)
    assert pair.quantised.identity.quantization is not None, "one of the pair is in 4 bits"
    task.context.reporter.phase("measuring what the quantisation cost")
    eos = adopt_tokenizer(pair.plain.path, task.context.prompting).eos_token_ids
    difference = None if quantised is None or plain is None else paired_difference(quantised, plain)
    return QuantisationCost(
        quantization=pair.quantised.identity.quantization,
        quantised=pair.names[0],
        plain=pair.names[1],
        reverse_kl=quantisation_kl(pair.quantised, pair.plain, eos, task),
        accuracy_difference=difference,
    )


def _comparisons(candidate: str, scored: Mapping[str, Scored]) -> list[Comparison]:
    first = scored[candidate].greedy_correct
    return [
        Comparison(candidate=candidate, baseline=name, accuracy_difference=paired_difference(first, other))
        for name, entry in scored.items()
        if name != candidate and first is not None and (other := entry.greedy_correct) is not None
    ]


def _gaps(candidate: str, teacher: str | None, scored: Mapping[str, Scored]) -> list[GapClosed]:
    """The share of the gap to the teacher that the candidate closed, from every other model on."""
    if teacher is None or teacher == candidate:
        return []
    gaps = []
    for name in scored.keys() - {candidate, teacher}:
        triple = [scored[each] for each in (candidate, name, teacher)]
        shares = [entry.sampled_shares for entry in triple]
        basis = "sampled accuracy"
        if any(values is None for values in shares):
            shares, basis = [entry.greedy_correct for entry in triple], "greedy accuracy"
        measured = [values for values in shares if values is not None]
        if len(measured) < len(triple):
            continue
        share = gap_closed(*measured, basis=basis)
        why = None if share else f"{teacher} is not more accurate than {name} beyond chance"
        gaps.append(GapClosed(candidate=candidate, baseline=name, teacher=teacher, share=share, not_measured=why))
    return sorted(gaps, key=lambda gap: list(scored).index(gap.baseline))


def shown_answers(rows: Sequence[PromptRow], scored: Mapping[str, Scored]) -> list[ShownAnswers]:
    """The first prompts with each model's response, all cut to size."""
    by_id = {row.id: row for row in rows}
    first = next(iter(scored.values())).shown
    return [
        ShownAnswers(
            prompt=shortened(by_id[row_id].text(), PROMPT_CHARACTERS),
            answer=None if (answer := by_id[row_id].answer) is None else shortened(answer, ANSWER_CHARACTERS),
            responses={
                name: shortened(entry.shown[row_id], RESPONSE_CHARACTERS)
                for name, entry in scored.items()
                if row_id in entry.shown
            },
            tokens={name: entry.ratios[row_id] for name, entry in scored.items() if row_id in entry.ratios},
            right={
                name: bool(entry.greedy_correct[place])
                for name, entry in scored.items()
                if entry.greedy_correct is not None and (place := _place(entry, row_id)) is not None
            },
        )
        for row_id in first
    ]


def _place(scored: Scored, row_id: str) -> int | None:
    return list(scored.shown).index(row_id) if row_id in scored.shown else None


def truncation_warnings(scores: Iterable[ModelScore], section: BenchmarkRecipe) -> list[str]:
    """At most one warning: where the length limit cut many responses: a cut response mostly has no answer."""
    cut = [
        f"{score.truncated_fraction:.0%} of {score.name}"
        for score in scores
        if score.truncated_fraction is not None and score.truncated_fraction > TRUNCATED_SHARE
    ]
    if not cut:
        return []
    message = (
        f"Responses cut at {section.sampling.max_new_tokens} tokens: {', '.join(cut)}. Such an accuracy is that of the "
        "limit; raise 'benchmark.sampling.max_new_tokens' (a thinking model needs 32768 or more)."
    )
    return [message]


def report_markdown(report: BenchmarkReport) -> str:
    """Markdown: one row per model, paired differences, costs, and how each number was obtained."""
    lines = [
        f"# Benchmark: {shortened(report.run, HEADING_CHARACTERS)}" if report.run else "# Benchmark",
        "",
        *_verdict_lines(report),
        f"{report.prompts} prompts, {report.prompts_with_answer} with an answer; seed {report.seed}; "
        f"{report.hardware}; recipe {report.recipe_hash[:12]}.",
        *_suite_lines(report),
        "",
        f"| model | greedy accuracy | sampled accuracy{_samples(report)} | reverse KL, nats/token | mean tokens "
        "| truncated | EOS rate |",
        "|---|---|---|---|---|---|---|",
        *(_row(model) for model in report.models),
        *(f"| {name} | not measured: {why} | | | | | |" for name, why in report.not_measured.items()),
        "",
    ]
    lines += _metric_lines(report)
    lines += _domain_lines(report)
    lines += [
        f"{c.candidate} − {c.baseline}: accuracy {_interval(c.accuracy_difference, signed=True)} "
        f"({c.accuracy_difference.basis})."
        for c in report.comparisons
    ]
    lines += [line for gap in report.gap_closed for line in ("", _gap_text(gap))]
    if report.quantisation:
        lines += ["", _quantisation_text(report.quantisation)]
    lines += [line for name, made in report.adapters.items() for line in ("", made.text(name))]
    lines += [line for name, repair in report.repairs.items() for line in ("", repair.text(name))]
    if report.grader and report.prompts_with_answer:
        lines += ["", f"Answers graded by `{report.grader}`: {report.grader_reason}."]
        lines += [f"- {model.answers.text(model.name)}" for model in report.models if model.answers]
    elif report.grader_reason and report.prompts_with_answer:
        lines += ["", f"Graded {report.grader_reason}."]
    made = {model.name: model.generated_by for model in report.models if model.generated_by}
    lines += [line for name, facts in made.items() for line in ("", f"Responses of {name} by {facts.label()}.")]
    if report.teacher_responses:
        lines += [
            "",
            f"Before the SFT: {report.teacher_responses.text()}, {_interval(report.teacher_responses.right)}.",
        ]
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
        lines.append(f"| benchmark | {sum(model.seconds for model in report.models):.1f} | | | {report.hardware} |")
    return "\n".join(lines) + "\n"


def _verdict_lines(report: BenchmarkReport) -> list[str]:
    """The verdict, its cause and the next step, before everything else."""
    if report.verdict is None:
        return []
    verdict = report.verdict
    cause = [f"Cause: {verdict.cause}", ""] if verdict.cause else []
    following = [f"Next: {verdict.next_action.why}", ""] if verdict.next_action.why else []
    figures = "Figures, curves and samples: `report.html`, next to this file."
    return [f"**{verdict.judgement.replace('_', ' ')}**: {verdict.sentence}", "", *cause, *following, figures, ""]


def _suite_lines(report: BenchmarkReport) -> list[str]:
    """The suite, the prompt around each question, and what was changed of what is published."""
    if not report.suite:
        return []
    changes = [f"`{key}` {used!r} instead of {published!r}" for key, (published, used) in report.suite_changes.items()]
    how = f"changed: {', '.join(changes)}" if changes else "with its published settings"
    lines = [f"Suite `{report.suite}`, {how}."]
    if (template := report.recipe.prompt_template) is not None:
        lines += [f"Each prompt stands in {shortened(template, TEMPLATE_CHARACTERS)!r}."]
    return lines


def _row(model: ModelScore) -> str:
    return (
        f"| {model.name} | {_interval(model.greedy_accuracy)} | {_interval(model.sampled_accuracy)} "
        f"| {_interval(model.reverse_kl)} | {_number(model.mean_response_tokens, '.1f')} "
        f"| {_number(model.truncated_fraction, '.3f')} | {_number(model.eos_rate, '.3f')} |"
    )


def _metric_lines(report: BenchmarkReport) -> list[str]:
    """The metrics of a task of lm-eval, one column per model."""
    measured = [model for model in report.models if model.task_metrics]
    names = dict.fromkeys(name for model in measured for name in model.task_metrics or ())
    if not names:
        return []
    rows = [f"| {name} | {' | '.join(_metric(model, name) for model in measured)} |" for name in names]
    heads = [f"| metric | {' | '.join(model.name for model in measured)} |", "|---" * (len(measured) + 1) + "|"]
    return [*heads, *rows, ""]


def _domain_lines(report: BenchmarkReport) -> list[str]:
    """Accuracy and reverse KL by `teacher_domain`, a row per model and domain."""
    rows = [
        f"| {model.name} | {name.replace('|', '/')} | {_interval(own.greedy_accuracy)} | {_interval(own.reverse_kl)} |"
        for model in report.models
        for name, own in (model.by_domain or {}).items()
    ]
    heads = ["| model | domain | greedy accuracy | reverse KL, nats/token |", "|---|---|---|---|"]
    return [*heads, *rows, ""] if rows else []


def _metric(model: ModelScore, name: str) -> str:
    metric = (model.task_metrics or {}).get(name)
    if metric is None:
        return "–"
    interval = "" if metric.low is None else f" [{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:.3f}{interval} (n = {metric.samples})"


def _samples(report: BenchmarkReport) -> str:
    return f" (avg@{report.recipe.samples_per_prompt})" if report.recipe.samples_per_prompt else ""


def _gap_text(gap: GapClosed) -> str:
    found = f"not measured: {gap.not_measured}" if gap.share is None else f"{_interval(gap.share)} ({gap.share.basis})"
    return f"Share of the gap from {gap.baseline} to {gap.teacher} that {gap.candidate} closed: {found}."


def _quantisation_text(cost: QuantisationCost) -> str:
    """That π_ref is the dequantised model, and what that cost."""
    text = (
        f"Trained on a base in 4 bits ({cost.quantization}): π_ref, the rollouts and the training are those of the "
        f"dequantised weights, the row {cost.quantised}. Against {cost.plain}: KL({cost.quantised} ‖ {cost.plain}) "
        f"{_interval(cost.reverse_kl)} nats per token ({cost.reverse_kl.basis})"
    )
    if cost.accuracy_difference is not None:
        text += f"; accuracy {_interval(cost.accuracy_difference, signed=True)} ({cost.accuracy_difference.basis})"
    return text + "."


def _interval(estimate: Estimate95 | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _kl_basis(report: BenchmarkReport) -> str:
    return next((m.reverse_kl.basis for m in report.models if m.reverse_kl), "not measured")
