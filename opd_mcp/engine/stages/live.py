"""A live distillation's rows: rollouts of the student as it is at a step, scored by its teacher at once.

Of several ranks, which have the student in parts, each draws and scores its share by whole copies; then all have all
rows. A batch and a micro-batch are the same for any number of ranks, and so are their rows with the same weights.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.context import Context, DistillInputs, RankPlace
from opd_mcp.engine.data.batches import StepData, StepsFrom, shuffled_batches
from opd_mcp.engine.data.encoding import EncodedPrompt, context_of, encode_prompts, ids_of, recorded_moment
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import LocalGenerator, RankGenerator
from opd_mcp.engine.models.loading import AdoptedTokenizer, LoadedModel, adopt_tokenizer
from opd_mcp.engine.models.lora import without_adapters
from opd_mcp.engine.parts import Shares
from opd_mcp.engine.provenance import claim_of, full_identity, require_self
from opd_mcp.engine.runtime import Runtime, generator_for
from opd_mcp.engine.scoring.local import Scoring, engine_gap, scored_in_shares
from opd_mcp.engine.training.following import EngineFollower
from opd_mcp.engine.training.ranks import shares_of
from opd_mcp.identity.consistency import require_consistent
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash, require_all_or_no_domain
from opd_mcp.identity.tokenizers import require_unused, special_differences
from opd_mcp.schemas.identity import ModelIdentity, Parent, TeacherClaim
from opd_mcp.schemas.recipes import DistillRecipe, RolloutRecipe, base_form


@dataclass(frozen=True)
class LiveSource:
    """Prompts for rollouts that a live teacher will score; a `follower` draws them in place of the student itself.

    Of several ranks each draws and scores its share; `rank` is the place of this one.
    """

    prompts: list[EncodedPrompt]
    teacher: ModelIdentity
    adopted: AdoptedTokenizer
    parents: list[Parent]
    claim: TeacherClaim | None
    rendered_at: str | None = None
    follower: EngineFollower | None = None
    rank: RankPlace | None = None

    @property
    def domains(self) -> Mapping[str, int]:
        """Prompts by the domain of their teacher; none where they have no domain."""
        return Counter(prompt.row.teacher_domain for prompt in self.prompts if prompt.row.teacher_domain is not None)


def open_live(section: DistillRecipe, inputs: DistillInputs, context: Context) -> LiveSource:
    """The prompts as the teacher's template encodes them, once teacher and student are proven to fit.

    Raises ConsistencyError `tokenizer_mismatch`, `teacher_mismatch` or `lineage_missing`, and as `self_claim`.
    """
    assert inputs.teacher is not None, "live distillation queries a teacher"
    assert inputs.prompts is not None, "live distillation draws rollouts for prompts"
    differing = special_differences(inputs.teacher, inputs.student)
    rows, claim = read_prompts(inputs.prompts), claim_of(inputs.student, inputs.sft_teacher, context)
    identity = full_identity(inputs.teacher).model_copy(update={"context": context_of(rows, context.prompting)})
    require_self(claim, identity, full_identity(inputs.student, base_form(section.adapter)))
    require_consistent(identity, claim, allowed=inputs.allow_teacher_mismatch)
    adopted = adopt_tokenizer(inputs.teacher, context.prompting)
    parents = [Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))]
    require_all_or_no_domain(rows)
    encoded = encode_prompts(rows, adopted.tokenizer, context)
    require_unused(differing, ids_of(encoded) if differing else (), context.prompting, inputs.student)
    moment = recorded_moment(adopted.tokenizer, context)
    return LiveSource(encoded, identity, adopted, parents, claim, moment, rank=context.ranks)


def live_batches(
    student: LoadedModel,
    teacher: LoadedModel,
    source: LiveSource,
    section: DistillRecipe,
    rollout: RolloutRecipe,
    runtime: Runtime,
) -> StepsFrom:
    """Each step's rollouts drawn from the student as it is then, or a few steps before, scored by the teacher at once.

    A step's random stream follows from the seed and the step's number, so a resumed run draws what it would have drawn.
    A teacher that is the student's own base is the same module with its adapters off. The first step raises RunError
    `engine_disagrees` as `engine_gap` does. On several ranks `student` is this one's whole copy.
    """
    valid_vocab, prompts = min(student.facts.tokens, teacher.facts.tokens), source.prompts
    scoring = Scoring(section.teacher_tokens, section.micro_batch_tokens, valid_vocab)
    sampling = rollout.sampling
    if section.horizon is not None and section.horizon >= 1 and section.horizon_growth_steps is None:
        drawn = min(sampling.max_new_tokens, int(section.horizon))  # what lies beyond would not be trained on
        sampling = sampling.model_copy(update={"max_new_tokens": drawn})

    def step_data(step: int, indices: NDArray[np.int64], shares: Shares | None, *, checked: bool) -> StepData:
        started = time.perf_counter()
        eos, scope = source.adopted.eos_token_ids, f"live/{step}"
        settings = GenerationSettings(sampling, eos, rollout.batch_size, runtime.seed, scope, valid_vocab)
        wanted = [prompts[row] for row in indices]
        if source.follower is not None:
            sequences = source.follower.draw(step, wanted, settings)
        else:
            draws = LocalGenerator(student) if shares is None else RankGenerator(student, shares)
            sequences = draws.draw(wanted, settings)
            if checked:
                engine_gap(student, sequences, runtime)
        generated = time.perf_counter()
        with without_adapters(student.model) if teacher.model is student.model else nullcontext():
            scores = scored_in_shares(teacher, sequences.for_teacher(), scoring, runtime, shares)
        rows, scored = sequences.with_columns(**scores.columns()), time.perf_counter()
        return StepData(rows, np.arange(len(rows)), generated - started, scored - generated)

    def steps_from(first: int) -> Iterator[StepData]:
        generator, size = generator_for(runtime.seed, "live", "order"), min(section.batch_size, len(prompts))
        batches = shuffled_batches(len(prompts), size, section.steps, generator, first=first)
        shares = shares_of(source.rank, runtime.device)
        numbered = enumerate(batches, start=first)
        return (step_data(step, rows, shares, checked=step == first) for step, rows in numbered)

    return steps_from
