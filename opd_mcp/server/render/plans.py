"""A plan in words: phases, costs, settings, and what stands in its way."""

import json

from opd_mcp.planning.costs.estimates import PROCESS_START
from opd_mcp.schemas.next_action import CallText, NextAction, advice_text
from opd_mcp.schemas.plans import Finding, FitOption, MethodEstimate, Plan, Preview
from opd_mcp.schemas.runs import UnderstoodData
from opd_mcp.schemas.texts import byte_size, duration, shortened
from opd_mcp.server.render.caches import measured_lines, prompts_text, rollouts_text
from opd_mcp.server.render.recipe_keys import setting_lines
from opd_mcp.server.render.runs import next_line

UNDERSTOOD_CHARACTERS = 300
PREVIEW_CHARACTERS = 160
FACT_CHARACTERS = 110


def plan_text(plan: Plan, call_text: CallText = NextAction.call_text) -> str:
    """The plan's id, phases, costs, settings and findings."""
    lines = [f"plan_id: {plan.plan_id} ({plan.method}, preset {plan.recipe.preset})"]
    lines += [f"preset {plan.recipe.preset} for {plan.preset_reason}"] if plan.preset_reason else []
    lines.append(f"phases: {phases_text(plan)}")
    lines += [
        f"arm {arm.name}: {arm.runs} run(s)" + (f", {duration(arm.seconds)} each" if arm.seconds is not None else "")
        for arm in plan.arms
    ]
    basis = f", {plan.consistency.basis}" if plan.consistency.basis else ""
    lines.append(f"teacher consistency: {plan.consistency.status}{basis}")
    lines += _plan_measures(plan)
    lines += preview_lines(plan.preview) if plan.preview else []
    lines += [_estimate_line(estimate) for estimate in plan.estimates]
    lines += [_fit_line(option) for option in plan.fits]
    lines += setting_lines(plan)
    lines += [finding_text("BLOCKING", finding, call_text) for finding in plan.blocking]
    lines += [finding_text("warning", finding, call_text) for finding in plan.warnings]
    return "\n".join([*lines, next_line(plan.next_action, call_text)])


def phases_text(plan: Plan) -> str:
    """The phases in order, with the artifacts of those that are done; of later rounds only that they follow."""
    shown = [phase for phase in plan.phases if phase.round is None or phase.round == 1]
    texts = [phase.name + (f" (done: {phase.satisfied_by})" if phase.satisfied_by else "") for phase in shown]
    if len(shown) < len(plan.phases):
        rounds, place = plan.recipe.distill.rounds, [phase.name for phase in shown].index("distill")
        when = " at most, each once the rollouts are stale" if plan.recipe.distill.round_trigger == "stale" else ""
        texts[place] += f" (rollout → score → distill: {rounds} rounds{when})"
    return " → ".join(texts)


def finding_text(word: str, finding: Finding, call_text: CallText = NextAction.call_text) -> str:
    """What was found, with the way out."""
    return f"{word} [{finding.code}] {finding.message} Fix: {advice_text(finding.fix, finding.call, call_text)}"


def _plan_measures(plan: Plan) -> list[str]:
    """What is known of the data before anything runs, with the cache that it was measured in."""
    verdict = plan.consistency
    lines = [f"prompts: {prompts_text(plan.hygiene)}"]
    for role, data in (("prompts", plan.inputs.prompts), ("eval_prompts", plan.inputs.eval_prompts)):
        if data is not None and data.understood is not None:
            lines.append(f"{role} read as {understood_text(data.understood)}")
    if (grading := plan.grading) is not None:
        right = f"{grading.right} of {grading.graded} expected answers are right when a response says just them"
        lines.append(f"answers are graded by '{grading.grader}' ({grading.why}); {right}")
    lines += measured_lines(verdict.teacher_delta, verdict.engine_gap)
    if verdict.measured_in and plan.rollouts:
        lines.append(f"rollouts in {verdict.measured_in}, where these were measured: {rollouts_text(plan.rollouts)}")
    if verdict.not_measured:
        lines.append(f"not known: {verdict.not_measured}")
    return lines


def preview_lines(preview: Preview) -> list[str]:
    """What the model is given and taught: a prompt, a row of SFT, stops, template, limits that are exceeded."""
    lines = []
    if preview.prompts:
        first = preview.prompts[0]
        lines.append(f"prompt {first.id} ({first.tokens} tokens): {_quoted(first.text)}")
        if first.teacher_text is not None:
            lines.append(f"of it the teacher sees: {_quoted(first.teacher_text)}")
    if preview.learnt is not None:
        learnt = preview.learnt
        lines.append(f"SFT learns ({learnt.source}, {learnt.learnt_tokens} tokens): {_quoted(learnt.learnt)}")
    stops = ", ".join(f"{token_id} {text!r}" for token_id, text in list(preview.stops.items())[:4])
    taught = preview.stops.get(str(preview.end_of_turn))
    lines.append(f"a response ends at {stops}" + (f"; taught: {taught!r}" if len(preview.stops) > 1 else ""))
    lines += [f"template, {name}: {shortened(said, FACT_CHARACTERS)}" for name, said in preview.template.items()]
    whole = preview.measured == preview.of
    of = f"all {preview.of} prompts" if whole else f"{preview.measured} prompts, sampled of {preview.of}"
    over = [f"{share.over} over {share.limit} ({share.tokens})" for share in preview.limits if share.over]
    lines.append(f"of {of}: {', '.join(over) or 'none over a limit'}")
    return lines


def _quoted(text: str) -> str:
    """A text with its beginning and its end, quoted in one line."""
    if len(text) > PREVIEW_CHARACTERS:
        text = f"{text[: PREVIEW_CHARACTERS // 2]} … {text[-PREVIEW_CHARACTERS // 2 :]}"
    return repr(text)


def understood_text(data: UnderstoodData) -> str:
    """The shape of a data set, the field of each part, and how many rows cannot be used."""
    fields = ", ".join(path if part == path else f"{part} from {path}" for part, path in data.columns.items())
    skipped = f"; {data.skipped} of {data.rows + data.skipped} rows skipped" if data.skipped else ""
    notes = "".join(f"; {note}" for note in data.notes)
    return shortened(f"{data.shape} ({fields}){skipped}{notes}", UNDERSTOOD_CHARACTERS)


WAYS = {"full": "all weights", "lora": "a LoRA adapter", "lora_4bit": "a LoRA adapter on a 4-bit base"}


def _fit_line(option: FitOption) -> str:
    """A way to train, its memory, and the overrides for it."""
    overrides = f"; overrides {json.dumps(option.overrides)}" if option.overrides else ""
    return (
        f"training {WAYS[option.name]} "
        f"{'fits' if option.fits else 'does not fit'}: {byte_size(option.peak_memory_bytes)} at "
        f"{option.micro_batch_tokens} tokens per micro-batch, {option.checkpointing} checkpointing{overrides}"
    )


def _estimate_line(estimate: MethodEstimate) -> str:
    start = next((phase for phase in estimate.phases if phase.phase == PROCESS_START), None)
    of_it = f" (of it {duration(start.seconds)} process start, {start.basis.split(':')[0]})" if start else ""
    engines = [f"{duration(phase.start_seconds)} in {phase.phase}" for phase in estimate.phases if phase.start_seconds]
    batches = [
        f"{phase.phase} {phase.batch_size} rows, {byte_size(phase.kv_cache_bytes)}"
        for phase in estimate.phases
        if phase.batch_size and phase.kv_cache_bytes is not None
    ]
    download = sum(phase.download_bytes or 0 for phase in estimate.phases)
    after = f" after a download of {byte_size(download)}" if download else ""
    return (
        f"{estimate.method}: {duration(estimate.seconds)}{after}{of_it}, {estimate.flops:.2g} FLOPs, "
        f"{byte_size(estimate.peak_memory_bytes)} memory, {byte_size(estimate.disk_bytes)} disk"
        + (f"; starts of engines: {', '.join(engines)}" if engines else "")
        + (f"; rows drawn at a time, and their keys and values: {'; '.join(batches)}" if batches else "")
    )
