"""What stands in a plan's way, and what its reader should know: tokenizers, teacher consistency, evaluation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_mcp.grading.child import AnswerLimits
from opd_mcp.grading.golds import gold_problems, no_answers_to_keep, odd_golds, recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.consistency import (
    consistency,
    context_mismatch,
    proven_claim,
    require_behaviour,
    require_consistent,
)
from opd_mcp.identity.data.rows import RawIds
from opd_mcp.identity.data.scan import overlap_of
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.identity.models import ModelFacts, inspect_model, require_decodable
from opd_mcp.identity.tokenizers import (
    TokenDifference,
    differences_text,
    require_unused,
    special_differences,
    token_map,
)
from opd_mcp.planning.adapter_bases import target_problems
from opd_mcp.planning.prompts.text_work import TextFacts
from opd_mcp.planning.references import ResolvedModel, ResolvedPrompts
from opd_mcp.schemas.cache import CacheManifest, PromptHygiene
from opd_mcp.schemas.errors import ConsistencyError, DataError, OpdError
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.plans import ConsistencyVerdict, Finding, GradingPlan
from opd_mcp.schemas.recipes import BenchmarkRecipe, DistillRecipe, PromptingRecipe, Recipe, SftRecipe, base_form
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import DataInput, RunInputs
from opd_mcp.schemas.texts import shortened

# above this share a distillation learns much from answers without an end
TRUNCATED_SHARE = 0.1
# Grading of expected answers stops after so many seconds, and says how many it has graded.
GOLDS_SECONDS, GOLD_SECONDS, GOLDS_AT_ONCE = 20.0, 2.0, 32
# above this share the wrong field may be meant
SKIPPED_SHARE = 0.1


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

    def warn(self, code: str, message: str, fix: str, call: NextAction | None = None) -> None:
        """Add a warning."""
        self.warnings.append(Finding(code=code, message=message, fix=fix, call=call))


def differing_tokens(teacher: ResolvedModel, student: ResolvedModel) -> tuple[TokenDifference, ...]:
    """The special tokens that differ between two models that are here.

    Raises ConsistencyError `tokenizer_mismatch` where ordinary tokens do.
    """
    if teacher.facts is None or student.facts is None:
        return ()
    if teacher.facts.identity.tokenizer == student.facts.identity.tokenizer:
        return ()
    return special_differences(teacher.facts.path, student.facts.path)


def require_usable_ids(raw: RawIds | None, tokenizer: Path, student: ModelFacts | None, section: SftRecipe) -> None:
    """Raise DataError for token ids that SFT could not learn.

    `unknown_token`: outside the vocabulary of the directory `tokenizer`; `too_large`: more in a row than the student
    has positions; `empty_data`: more in every row than `sft.max_length`.
    """
    if raw is None or raw.shortest is None:
        return
    size = max(token_map(tokenizer), default=-1) + 1
    if raw.largest >= size:
        raise DataError(
            "unknown_token",
            f"{_sentence(raw.largest_at)} holds the id {raw.largest}, and the vocabulary ends at {size - 1}.",
            value=raw.largest,
            fix="Give ids of the teacher's tokenizer, or leave the ids out and give text.",
        )
    if raw.shortest > section.max_length:
        raise DataError(
            "empty_data",
            f"Every row has more ids than sft.max_length ({section.max_length}); the shortest has {raw.shortest}.",
            value=raw.shortest,
            fix="Raise 'sft.max_length', or give other responses.",
        )
    positions = student.positions if student else None
    if positions is not None and positions < min(raw.longest, section.max_length):
        raise DataError(
            "too_large",
            f"{_sentence(raw.longest_at)} has {raw.longest} ids, and the student was made for {positions} positions.",
            value=raw.longest,
            fix=f"Set 'sft.max_length' to at most {positions}: longer rows are then left out and counted.",
        )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def judge_special_tokens(
    differing: Sequence[TokenDifference], facts: TextFacts, prompting: PromptingRecipe, found: Findings
) -> None:
    """Name the special tokens that differ; raises ConsistencyError `tokenizer_mismatch` where prompts have them."""
    if not differing:
        return
    used = set(facts.preview["watched"]) if facts.preview else set()
    require_unused(differing, used, prompting, differences_text(differing))
    found.warn(
        "special_tokens_differ",
        f"The vocabularies differ in special tokens (teacher / student): {differences_text(differing)}. "
        + (
            f"Prompts have {len(used)} of them, which the student learns in its SFT"
            if used
            else "None of the prompts looked at has one"
        )
        + "; the student is saved with the teacher's tokenizer.",
        "Nothing has to be done; the student's lineage records it.",
    )


def require_generating(*models: ResolvedModel) -> None:
    """Raise PathError `unsupported_model` for a model, known by its model_type, that cannot generate here."""
    for model in models:
        if model.facts is not None:
            require_decodable(model.facts)


def require_positions(longest: int, drawn: tuple[str, int], models: Sequence[ResolvedModel]) -> None:
    """Raise DataError `too_long` where a prompt of `longest` tokens and the new ones exceed a model's positions.

    `drawn`: the setting that says how many new tokens, and how many.
    """
    key, new = drawn
    positions = [model.facts.positions for model in models if model.facts is not None]
    room = min((most for most in positions if most is not None), default=None)
    if room is not None and longest + new > room:
        raise DataError(
            "too_long",
            f"A prompt of {longest} tokens and {new} new ones ({key}) are more than the {room} positions of the model.",
            value=new,
            fix=f"Set '{key}' to at most {room - longest}." if room > longest else "Give shorter prompts.",
        )


def judge_adapters(recipe: Recipe, student: ModelFacts | None, sft: bool, found: Findings) -> None:
    """Block adapters on layers that the student does not have, and one that is to continue another than the SFT's."""
    sections: dict[str, SftRecipe | DistillRecipe] = {"sft": recipe.sft} if sft else {}
    problems = target_problems(sections | {"distill": recipe.distill}, student)
    found.blocking += [Finding.of_error(error) for error in problems]
    wanted, made = recipe.distill.adapter, recipe.sft.adapter
    if not sft or wanted is None or not wanted.continue_adapter:
        return
    if made is None or made.saved_as(recipe.runtime.dtype) == "merged":
        found.blocking.append(
            Finding(
                code="no_adapter",
                message="distill.adapter.continue_adapter needs an adapter, but the SFT of this run ends with a whole "
                "model.",
                fix="Set 'sft.adapter.save' to 'adapter' or 'both', or 'distill.adapter.continue_adapter' to false.",
                overrides={"sft.adapter.save": "both"} if made else {"distill.adapter.continue_adapter": False},
            )
        )
    elif (made.rank, made.scale) != (wanted.rank, wanted.scale):
        found.blocking.append(
            Finding(
                code="invalid_argument",
                message=f"The adapter to continue has rank {made.rank} and scale {made.scale:g} after the SFT, "
                f"distill.adapter asks for rank {wanted.rank} and scale {wanted.scale:g}.",
                fix="Give 'distill.adapter' the rank, alpha and scaling of 'sft.adapter'.",
                overrides={f"distill.adapter.{key}": getattr(made, key) for key in ("rank", "alpha", "scaling")},
            )
        )


def require_own_rollouts(cache: CacheManifest, student: ResolvedModel, recipe: Recipe) -> None:
    """Raise ConsistencyError `behaviour_mismatch` unless a cache has rollouts of what would be distilled."""
    if student.facts is not None:
        held = inspect_model(student.facts.path, form=base_form(recipe.distill.adapter))
        require_behaviour(cache.behaviour, held.identity)


def judge_quantization(recipe: Recipe, sft: bool, student: ResolvedModel, found: Findings) -> None:
    """Block what would round dequantised weights with a merged adapter to 4 bits again."""
    distilled, made = recipe.distill.adapter, recipe.sft.adapter
    first = made if sft else distilled
    lineage = read_lineage(student.facts.path) if student.facts else None
    before = lineage.adapter if lineage else None
    was_merged = before is not None and before.quantization is not None and before.saved != "adapter"
    again = was_merged and first is not None and first.quantization is not None
    if sft and made is not None and distilled is not None and distilled.quantization is not None:
        again = again or made.saved_as(recipe.runtime.dtype) != "adapter"
    if again:
        found.blocking.append(
            Finding(
                code="lossy_precision",
                message="A student with a merged adapter would be rounded to 4 bits: weights that already were on the "
                "16 levels go back to them, and most of what the adapter learnt is lost.",
                fix="Give a student that was saved as an adapter ('sft.adapter.save' = 'adapter'): base and adapter "
                "then stay apart. Or leave out the quantization.",
            )
        )


def judge_unsized(inputs: PlanInputs, found: Findings) -> None:
    """Warn that nothing can be estimated where the Hub does not say how large a model is."""
    for role, model in (("teacher", inputs.teacher), ("student", inputs.student)):
        if model.unsized is not None:
            found.warn(
                "no_estimates",
                f"Time, memory and disk are not estimated: the sizes of the {role} {model.input.reference} are not "
                f"known before its download; {model.unsized}.",
                "Plan again once the Hub can be asked, or download the model and give its absolute path.",
            )


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
    arguments: PlanDistillation, inputs: PlanInputs, recipe: Recipe, found: Findings
) -> tuple[bool, ConsistencyVerdict]:
    """Whether the student needs its SFT first, and the verdict on the teacher; adds what stands in the way."""
    teacher, claim = inputs.teacher.input, inputs.student.input.sft_teacher
    if arguments.method == "sft" and recipe.sft.skip:
        found.blocking.append(
            Finding(
                code="invalid_argument",
                message="method='sft' is the SFT alone, and sft.skip leaves it out.",
                fix="Leave out 'sft.skip', or use method='lightning' or 'live'.",
            )
        )
    if arguments.method == "sft" or claim is None:
        if inputs.sft_prompts is not None and teacher.identity is not None:
            _judge_context(teacher.identity, inputs.sft_prompts, recipe, arguments, found)
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
            "To have it proven, give a student whose SFT was a run of this workspace.",
        )
    return False, verdict


def _judge_context(
    teacher: ModelIdentity, sft_prompts: ResolvedPrompts, recipe: Recipe, arguments: PlanDistillation, found: Findings
) -> None:
    """Block a teacher that would see messages of its own in only one of SFT and distillation."""
    seen = sft_prompts.context(recipe.prompting)
    answering = teacher.model_copy(update={"context": seen})
    known = sft_prompts.input.path is not None and arguments.method != "sft"
    if not known or answering.same_context(teacher):
        return
    error = context_mismatch(teacher, proven_claim(answering))
    if arguments.allow_teacher_mismatch:
        found.warn(error.code, f"{error.message} You allowed it; the report records it.", error.fix, error.call)
    else:
        found.blocking.append(Finding.of_error(error))


def _add_mismatch(verdict: ConsistencyVerdict, allowed: bool, found: Findings) -> None:
    assert verdict.teacher is not None
    try:
        require_consistent(verdict.teacher, verdict.sft_teacher, allowed=False)
    except ConsistencyError as error:
        if allowed:
            found.warn(error.code, f"{error.message} You allowed it; the report records it.", error.fix, error.call)
        else:
            found.blocking.append(Finding.of_error(error))


def judge_data(inputs: PlanInputs, found: Findings) -> None:
    """Warn of data that is still to be fetched, and of many rows that cannot be used."""
    named = {"prompts": inputs.prompts, "sft_prompts": inputs.sft_prompts, "eval_prompts": inputs.eval_prompts}
    for argument, prompts in named.items():
        if prompts is None:
            continue
        understood = prompts.input.understood
        if prompts.input.path is None:
            found.warn(
                "checked_after_fetch",
                f"{argument} are still to be fetched from the Hub; their rows, shape and overlap are not known yet.",
                "Download the data set first, and give its path, to know before the start.",
            )
        elif understood is not None and understood.skipped_share > SKIPPED_SHARE:
            first = understood.skipped_rows[0]
            found.warn(
                "rows_skipped",
                f"{understood.skipped} of {understood.rows + understood.skipped} rows of {argument} cannot be used; "
                f"the first is {first.place}: {first.reason}.",
                "Repair these rows, or name the fields that are meant with columns=….",
            )


def judged_golds(inputs: PlanInputs, recipe: BenchmarkRecipe, found: Findings) -> GradingPlan | None:
    """How answers are graded; expected answers that a response could say and be graded as wrong are blocking.

    A few answers of another kind than the rest, which decide the grader for all of them, are a warning.
    """
    if inputs.eval_prompts is None or not (golds := inputs.eval_prompts.scan.golds):
        return None
    answers, total = [gold for _, gold in golds], inputs.eval_prompts.scan.rows_with_answer
    name, why = recipe_grader(recipe, answers)
    limits = AnswerLimits(cpu_seconds=GOLD_SECONDS)
    problems: list[tuple[str, str]] = []
    graded, until = 0, time.monotonic() + GOLDS_SECONDS
    try:
        with grader_for(name, pattern=recipe.answer_pattern, allow_code=recipe.allow_code, limits=limits) as grader:
            while graded < len(golds) and time.monotonic() < until:
                part = golds[graded : graded + GOLDS_AT_ONCE]
                found_in = gold_problems(grader, [gold for _, gold in part])
                problems += [part[problem.row] for problem in found_in]
                graded += len(part)
    except OpdError as error:
        found.blocking.append(Finding.of_error(error))
        return None
    if name == "math" and recipe.grader == "auto" and (odd := odd_golds(answers)) is not None:
        row, gold = golds[odd.first]
        found.warn(
            "golds_of_two_kinds",
            f"{odd.count} of {odd.of} expected answers do not fit the grader '{odd.usual}' as the others do, so 'math' "
            f"grades all of them; the first is {row}: {shortened(gold, 60)!r}.",
            f"Repair or leave out these prompts if their answers are mistakes: '{odd.usual}' then grades the others.",
        )
    if problems:
        shown = ", ".join(f"{row}: {shortened(gold, 60)!r}" for row, gold in problems[:3])
        of = f"all {total}" if graded == total else f"{graded} sampled of {total}"
        found.blocking.append(
            Finding(
                code="golds_not_gradable",
                message=f"{len(problems)} of {of} expected answers are graded as wrong by the grader '{name}' ({why}) "
                f"when a response says just them, in a sentence or in \\boxed{{}}: {shown}.",
                fix=(
                    "Set 'benchmark.answer_pattern' to null, so that the answers choose the grader, or to a pattern "
                    "that finds them whole."
                    if name == "regex"
                    else "Set 'benchmark.grader' to one that fits, repair these answers, or name their field by "
                    "columns=…."
                ),
                overrides={"benchmark.answer_pattern": None} if name == "regex" else None,
            )
        )
    return GradingPlan(grader=name, why=why, right=graded - len(problems), graded=graded)


def lacks_answers(prompts: DataInput | None) -> bool:
    """Whether prompts are known to have no answers."""
    return prompts is not None and prompts.path is not None and not prompts.rows_with_answer


def judge_kept(recipe: Recipe, prompts: DataInput | None, found: Findings) -> None:
    """Block keeping the right responses to prompts without answers."""
    if recipe.responses.keep == "right" and lacks_answers(prompts):
        found.blocking.append(Finding.of_error(no_answers_to_keep()))


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
    if inputs.eval_prompts.input.path is None:
        return
    if inputs.eval_prompts.input.rows_with_answer == 0:
        found.warn(
            "no_answers",
            "The eval prompts have no `answer`, so the report holds the reverse KL to the teacher only.",
            "Add an `answer` to each eval prompt.",
        )
    evaluation = inputs.eval_prompts.scan
    training = [used.scan for used in (inputs.prompts, inputs.sft_prompts) if used]
    found_in = overlap_of([evaluation], training)
    if overlap := found_in["eval_overlap_normalised"]:
        found.warn(
            "eval_overlap",
            f"{overlap} of {evaluation.rows} eval prompts are also training prompts "
            f"({found_in['eval_overlap_exact']} to the letter, the others but for case, spaces or punctuation); "
            "accuracy on them proves nothing.",
            "Give eval_prompts that are in no training set.",
        )


def judge_prompts(inputs: PlanInputs, facts: TextFacts, max_prompt_tokens: int, found: Findings) -> PromptHygiene:
    """What is odd in the prompts, by the same counts as a cache's manifest, the chat template's tokens left out.

    Warns of copies and of what is too long.
    """
    scan = inputs.prompts.scan
    over_long = round(facts.over * scan.long_rows / max(facts.counted, 1))
    estimated = facts.counted < scan.long_rows
    hygiene = PromptHygiene(
        prompts=scan.rows,
        over_long_prompts=over_long,
        duplicate_prompts=scan.duplicates(),
        **(scan.overlap(inputs.eval_prompts.scan) if inputs.eval_prompts else {}),
    )
    if hygiene.duplicate_prompts:
        found.warn(
            "duplicate_prompts",
            f"{hygiene.duplicate_prompts} of {scan.rows} prompts are duplicates; all are used.",
            "Remove the copies if they are not meant.",
        )
    if hygiene.over_long_prompts:
        found.warn(
            "over_long_prompts",
            f"{'About ' if estimated else ''}{over_long} of {scan.rows} prompts are over {max_prompt_tokens} tokens "
            "and will be left out"
            + (f" (estimated from {facts.counted} of the {scan.long_rows} longest)." if estimated else "."),
            "Raise 'prompting.max_prompt_tokens' to use them.",
        )
    return hygiene
