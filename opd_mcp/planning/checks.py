"""What stands in a plan's way, and what its reader should know: tokenizers, teacher consistency, evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_mcp.identity.consistency import consistency, require_consistent
from opd_mcp.identity.data import PromptRow, eval_overlap
from opd_mcp.identity.tokenizers import require_same_tokens
from opd_mcp.planning.references import ResolvedModel, ResolvedPrompts
from opd_mcp.schemas.cache import CacheManifest, PromptHygiene
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.plans import ConsistencyVerdict, Finding
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs

# above this share a distillation learns much from answers without an end
TRUNCATED_SHARE = 0.1


@dataclass(frozen=True)
class PlanInputs:
    """The resolved inputs of a distillation with what only planning needs of them."""

    student: ResolvedModel
    teacher: ResolvedModel
    prompts: ResolvedPrompts
    sft_prompts: ResolvedPrompts | None
    eval_prompts: ResolvedPrompts | None
    schema: RunInputs


@dataclass
class Findings:
    """What blocks a plan and what its reader should know."""

    blocking: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def warn(self, code: str, message: str, fix: str) -> None:
        """Add a warning."""
        self.warnings.append(Finding(code=code, message=message, fix=fix))


def require_matching_tokenizers(teacher: ResolvedModel, student: ResolvedModel) -> None:
    """Raise ConsistencyError `tokenizer_mismatch` for two models that are here and whose tokens differ."""
    if teacher.facts is None or student.facts is None:
        return
    if teacher.facts.identity.tokenizer != student.facts.identity.tokenizer:
        require_same_tokens(teacher.facts.path, student.facts.path)


def judge_files(inputs: PlanInputs, found: Findings) -> None:
    """Warn of what a model's directory holds that other programs would load and this one does not."""
    for role, model in (("teacher", inputs.teacher), ("student", inputs.student)):
        if model.facts is not None and model.facts.unused:
            found.warn(
                "files_unused",
                f"The {role}'s tokenizer is built from tokenizer.json and one chat template alone; not used: "
                f"{'; '.join(model.facts.unused)}.",
                "Nothing has to be done, unless one of these was meant; then save it into tokenizer.json or "
                "chat_template.jinja.",
            )


def judge_consistency(
    arguments: PlanDistillation, inputs: PlanInputs, found: Findings
) -> tuple[bool, ConsistencyVerdict]:
    """Whether the student needs its SFT first, and the verdict on the teacher; adds what stands in the way."""
    teacher, claim = inputs.teacher.input, inputs.student.input.sft_teacher
    if arguments.method == "sft" or claim is None:
        verdict = ConsistencyVerdict(
            status="consistent",
            basis="by_construction",
            teacher=teacher.identity,
            mismatch_allowed=arguments.allow_teacher_mismatch,
        )
        return True, verdict
    if teacher.identity is None or inputs.student.input.identity is None:
        found.warn(
            "checked_after_fetch",
            "A model is still to be fetched from the Hub; tokenizers and teacher consistency are checked after that.",
            "Fetch the models first, and give their paths, to know before the start.",
        )
        if teacher.identity is None:
            return False, ConsistencyVerdict(status="unknown", sft_teacher=claim)
    if arguments.declared_teacher is not None and claim.basis == "proven":
        found.warn(
            "declared_teacher_unused",
            f"The student's lineage proves its SFT teacher, {claim.label()}; declared_teacher is not used.",
            "Leave out declared_teacher.",
        )
    verdict = consistency(teacher.identity, claim, allowed=arguments.allow_teacher_mismatch)
    if verdict.status == "mismatch":
        _add_mismatch(verdict, arguments.allow_teacher_mismatch, found)
    elif claim.basis == "asserted":
        found.warn(
            "lineage_asserted",
            f"That the student was fine-tuned on responses of {claim.label()} is asserted, not proven: by you, or by a "
            "lineage.json that this workspace did not write.",
            "Give a student that start_sft made in this workspace to have it proven.",
        )
    return False, verdict


def _add_mismatch(verdict: ConsistencyVerdict, allowed: bool, found: Findings) -> None:
    assert verdict.teacher is not None
    try:
        require_consistent(verdict.teacher, verdict.sft_teacher, allowed=False)
    except ConsistencyError as error:
        if allowed:
            found.warn(error.code, f"{error.message} You allowed it; the report records it.", error.fix)
        else:
            found.blocking.append(Finding(code=error.code, message=error.message, fix=error.fix))


def judge_evaluation(inputs: PlanInputs, found: Findings) -> None:
    """Warn of eval prompts that are missing, without answers, or among the training prompts."""
    if inputs.eval_prompts is None:
        found.warn(
            "no_eval_prompts",
            "Without eval_prompts no accuracy is measured; the report holds the reverse KL to the teacher on the "
            "distillation prompts.",
            "Give eval_prompts=… with answers that are in no training set.",
        )
        return
    if inputs.eval_prompts.input.rows_with_answer == 0:
        found.warn(
            "no_answers",
            "The eval prompts have no `answer`, so the report holds the reverse KL to the teacher only.",
            "Add an `answer` to each eval prompt.",
        )
    training = [row.text() for used in (inputs.prompts, inputs.sft_prompts) if used for row in used.rows]
    found_in = eval_overlap([row.text() for row in inputs.eval_prompts.rows], training)
    if overlap := found_in["eval_overlap_normalised"]:
        found.warn(
            "eval_overlap",
            f"{overlap} of {len(inputs.eval_prompts.rows)} eval prompts are also training prompts "
            f"({found_in['eval_overlap_exact']} to the letter, the others but for case, spaces or punctuation); "
            "accuracy on them proves nothing.",
            "Give eval_prompts that are in no training set.",
        )


def judge_prompts(inputs: PlanInputs, max_prompt_tokens: int, found: Findings) -> PromptHygiene:
    """What is odd in the prompts, by the same counts as a cache's manifest, the chat template's tokens left out.

    Warns of copies and of what is too long.
    """
    rows = inputs.prompts.rows
    texts = [row.text() for row in rows]
    facts = inputs.teacher.facts or inputs.student.facts
    evaluation = inputs.eval_prompts
    hygiene = PromptHygiene(
        prompts=len(rows),
        over_long_prompts=over_long_prompts(facts.path, rows, max_prompt_tokens) if facts else 0,
        duplicate_prompts=len(texts) - len(set(texts)),
        **(eval_overlap(texts, [row.text() for row in evaluation.rows]) if evaluation else {}),
    )
    if hygiene.duplicate_prompts:
        found.warn(
            "duplicate_prompts",
            f"{hygiene.duplicate_prompts} of {len(rows)} prompts stand in the set more than once; all are used.",
            "Remove the copies if they are not meant.",
        )
    if hygiene.over_long_prompts:
        found.warn(
            "over_long_prompts",
            f"{hygiene.over_long_prompts} of {len(rows)} prompts are over {max_prompt_tokens} tokens and will be left "
            "out.",
            "Raise 'prompting.max_prompt_tokens' to use them.",
        )
    return hygiene


def judge_rollouts(manifest: CacheManifest, cache_id: str, found: Findings) -> None:
    """Warn when many rollouts of an existing cache have no end or no content, or rows were left out of it."""
    statistics, hygiene = manifest.rollouts, manifest.hygiene
    if statistics.truncated_fraction > TRUNCATED_SHARE:
        found.warn(
            "rollouts_truncated",
            f"{statistics.truncated_fraction:.0%} of the rollouts in {cache_id} have no end (on_truncated: "
            f"{hygiene.on_truncated}, {hygiene.truncated_dropped} dropped, {hygiene.truncated_capped} capped).",
            "Raise 'rollout.sampling.max_new_tokens', or set 'score.on_truncated' to 'drop' or 'cap'.",
        )
    if statistics.empty_responses:
        found.warn(
            "rollouts_empty",
            f"{statistics.empty_responses} of {statistics.rows} rollouts in {cache_id} hold no token but the end; they "
            "teach when to stop, nothing else.",
            f"Look at some with inspect_cache(cache='{cache_id}'); a student that often ends at once needs more SFT.",
        )
    if hygiene.quarantined:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in hygiene.quarantined.items())
        found.warn("rows_left_out", f"Rows were left out of {cache_id}: {reasons}.", "Nothing has to be done.")


SAMPLED_PROMPTS = 64


def mean_prompt_tokens(model: Path, rows: Sequence[PromptRow]) -> float | None:
    """Mean tokens of evenly sampled prompts, without the chat template's; None for a tokenizer that cannot be read."""
    from tokenizers import Tokenizer

    step = max(len(rows) // SAMPLED_PROMPTS, 1)
    texts = [_whole_text(row) for row in rows[::step][:SAMPLED_PROMPTS]]
    try:
        encodings = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(texts)
    except Exception:  # the Rust side raises bare Exception; a length for an estimate is no reason to fail
        return None
    return round(sum(len(encoding.ids) for encoding in encodings) / len(texts), 2)


def over_long_prompts(model: Path, rows: Sequence[PromptRow], limit: int) -> int:
    """Prompts of more than `limit` tokens, the chat template's not counted; 0 for a tokenizer that cannot be read."""
    from tokenizers import Tokenizer

    # A token is at least one byte, so a short text needs no tokenizer.
    texts = [text for row in rows if len((text := _whole_text(row)).encode(errors="replace")) > limit]
    if not texts:
        return 0
    try:
        encodings = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(texts)
    except Exception:  # as above
        return 0
    return sum(len(encoding.ids) > limit for encoding in encodings)


def _whole_text(row: PromptRow) -> str:
    if row.prompt is not None:
        return row.prompt
    return "\n".join(str(message.get("content", "")) for message in row.messages or ())
