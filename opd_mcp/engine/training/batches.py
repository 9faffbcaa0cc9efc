"""Where a distillation step's rows come from: the teacher cache, or the current student and the live teacher."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.data.batches import shuffled_batches
from opd_mcp.engine.data.prompts import EncodedPrompt
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.generation.rollouts import draw_rollouts
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.runtime import Runtime, generator_for
from opd_mcp.engine.teachers.local import score_sequences
from opd_mcp.engine.training.loop import StepData, StepsFrom
from opd_mcp.schemas.recipes import DistillRecipe, RolloutRecipe


def stored_batches(sequences: Sequences, *, steps: int, batch_size: int, seed: int, scope: str) -> StepsFrom:
    """Shuffled epochs over stored rows."""

    def steps_from(first: int) -> Iterator[StepData]:
        generator, size = generator_for(seed, scope, "order"), min(batch_size, len(sequences))
        for indices in shuffled_batches(len(sequences), size, steps, generator, first=first):
            # copied together: a cache is a memory-mapped file, and a step reads its own rows only
            yield StepData(sequences.take(indices), np.arange(len(indices)))

    return steps_from


def live_batches(
    student: LoadedModel,
    teacher: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    *,
    recipe: DistillRecipe,
    rollout: RolloutRecipe,
    eos_token_ids: Sequence[int],
    valid_vocab: int,
    runtime: Runtime,
) -> StepsFrom:
    """Each step's rollouts drawn from the student as it is then, scored by the teacher at once.

    A step's random stream follows from the seed and the step's number, so a resumed run draws what it would have drawn.
    """

    def step_data(step: int, indices: NDArray[np.int64]) -> StepData:
        started = time.perf_counter()
        sequences = draw_rollouts(
            student,
            [prompts[row] for row in indices],
            rollout.sampling,
            eos_token_ids=eos_token_ids,
            batch_size=rollout.batch_size,
            seed=runtime.seed,
            scope=f"live/{step}",
            valid_vocab=valid_vocab,
        )
        generated = time.perf_counter()
        scores = score_sequences(
            teacher,
            sequences,
            topk=recipe.topk if recipe.estimator != "sampled" else 0,
            micro_batch_tokens=recipe.micro_batch_tokens,
            runtime=runtime,
            valid_vocab=valid_vocab,
        )
        scored = time.perf_counter()
        return StepData(
            sequences.with_columns(**scores.columns()),
            np.arange(len(sequences)),
            generated - started,
            scored - generated,
        )

    def steps_from(first: int) -> Iterator[StepData]:
        generator, size = generator_for(runtime.seed, "live", "order"), min(recipe.batch_size, len(prompts))
        batches = shuffled_batches(len(prompts), size, recipe.steps, generator, first=first)
        return (step_data(step, indices) for step, indices in enumerate(batches, start=first))

    return steps_from
