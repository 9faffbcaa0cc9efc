"""Supervised fine-tuning of the student on the teacher's responses."""

from pathlib import Path

import numpy as np

from opd_mcp.engine.context import Context, SftInputs
from opd_mcp.engine.data.batches import stored_batches
from opd_mcp.engine.data.encoding import recorded_moment
from opd_mcp.engine.data.targets import sft_targets
from opd_mcp.engine.evaluation.teacher_responses import graded_responses
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model, model_warnings
from opd_mcp.engine.models.saving import SavedForm, saved_files
from opd_mcp.engine.provenance import Provenance, adapter_origin, claim_of, frozen_hash, full_identity, record_lineage
from opd_mcp.engine.runtime import loading_runtime, open_runtime
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import sft_metrics
from opd_mcp.engine.training.watches import tell_undertrained
from opd_mcp.identity.data.reading import read_responses
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.tokenizers import differences_text, require_unused, special_differences
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.identity import Parent
from opd_mcp.schemas.recipes import SftRecipe
from opd_mcp.schemas.reports import TrainingSummary


def sft(section: SftRecipe, inputs: SftInputs, output: Path, context: Context) -> TrainingSummary:
    """Fine-tune the student on the teacher's response tokens; the model at `output` adopts the teacher's tokenizer."""
    student, responses = inputs.student, inputs.responses
    runtime = open_runtime(context.runtime)
    claim = claim_of(responses, inputs.sft_teacher, context) if responses.is_dir() else inputs.sft_teacher
    saved = responses / "tokenizer"
    adopted = adopt_tokenizer(inputs.tokenizer or (saved if saved.is_dir() else student), context.prompting)
    differing = special_differences(adopted.path, student)
    rows = read_responses(responses)
    grading = inputs.grading if context.writes else None
    graded = graded_responses(rows, adopted.tokenizer, grading, context) if grading else None
    targets = sft_targets(rows, adopted, section, context)
    used = {*map(int, np.unique(targets.sequences.prompt_ids)), adopted.end_of_turn}
    require_unused(differing, used, context.prompting, student)
    if differing:
        context.reporter.alert("special_tokens_differ", f"Teacher / student: {differences_text(differing)}.")
    model = load_model(student, loading_runtime(runtime, context), for_training=True, adapter=section.adapter)
    model_warnings(context, model)
    origin = adapter_origin(model, section.adapter, context)
    form = SavedForm.of(model, adopted, section.save_dtype, origin.saved if origin else None)
    form.try_out(model.model)
    steps = stored_batches(
        targets.sequences, steps=section.steps, batch_size=section.batch_size, seed=runtime.seed, scope="sft"
    )
    frozen = frozen_hash(origin, student)
    task = TrainingTask(LoopSettings.of(section, "token"), steps, SFT_OBJECTIVE, sft_metrics, frozen)
    summary = train(model.model, task, runtime, context)
    if not context.writes:
        return summary
    tell_undertrained(summary, model.facts.tokens, context)
    summary = summary.model_copy(update={"sft_rows": targets.rows, "teacher_responses": graded})
    if (refused := form.save(model.model, output)) is not None:
        context.reporter.alert("lossy_merge", refused)
    write_atomic(output / "training.json", summary.to_json(indent=2))
    responses_hash = content_hash([[row.prompt.text(), row.response, row.response_ids] for row in rows])
    parents = [
        Parent(role="student", identity=full_identity(student)),
        Parent(role="responses", sha256=responses_hash),
        *([Parent(role="base", identity=origin.base)] if origin else []),
    ]
    made = Provenance("model", "sft", section, parents, saved_files(output))
    told = differences_text(differing, len(differing)) or None
    rendered = any(row.response_ids is None or not row.prompt_ids for row in rows)
    moment = recorded_moment(adopted.tokenizer, context) if rendered else None
    claims = {"adapter": origin, "special_tokens_differ": told, "rendered_at": moment}
    record_lineage(output, made, context, sft_teacher=claim, **claims)
    return summary
