"""Bulk generation with a KV cache: left-padded, longest prompts first, finished rows dropped from the batch.

Where steps are recorded, rows join a batch as others end. A part, one batch or several, has a random stream of its own,
and what joins follows from it alone, so parts may be drawn by several processes (`SharedGenerator`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.batches import length_sorted_batches
from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences, TeacherPrompts, build_sequences, flatten
from opd_mcp.engine.generation.batch_state import BatchState, Generated, GenerationSettings
from opd_mcp.engine.generation.prefill import Prefill, Waiting
from opd_mcp.engine.generation.replay import draw_replayed, replays
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.kv_cache import continued, keep_rows, roomy_cache
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.parts import Arrays, Job, Shares, computed_together, share_of
from opd_mcp.engine.runtime import generator_for
from opd_mcp.schemas.identity import EngineFacts
from opd_mcp.schemas.recipes import Sampling

# Batches whose rows are drawn as one part where they can join: one tail of few rows instead of so many. With more there
# would be too few parts for several devices.
JOINING = 4
# dropping rows copies the KV cache: worth it once this share of the rows is done
FINISHED_SHARE_TO_DROP = 0.125


class Generator(Protocol):
    """What answers prompts, wherever it computes."""

    @property
    def facts(self) -> EngineFacts | None:
        """What it is; None for this program's own."""

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Sequences:
        """One response per prompt, with its log-probs (T = 1, untruncated) in `behaviour_logprobs`.

        The same prompts and settings give the same rows again. Raises OpdError once the generator is unusable.
        """


@dataclass(frozen=True)
class LocalGenerator:
    """A model in this process that answers prompts."""

    model: LoadedModel
    facts: EngineFacts | None = None

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Sequences:
        """As the protocol. Cached and live rollouts are drawn by this one method."""
        return as_sequences(prompts, generate(self.model.model, [prompt.ids for prompt in prompts], settings, on_batch))


@dataclass(frozen=True)
class SharedGenerator:
    """The same model in several processes: this one and the context's helpers draw batches of the same prompts."""

    model: LoadedModel
    context: Context
    facts: EngineFacts | None = None

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Sequences:
        """As the protocol; the same rows as one process draws, to the bit."""
        ids = [prompt.ids for prompt in prompts]
        parts = parts_of(self.model.model, ids, settings.batch_size)
        if len(parts) < 2:
            return LocalGenerator(self.model).draw(prompts, settings, on_batch)
        how = {name: value for name, value in vars(settings).items() if name != "sampling"}
        job = Job.of("draw", self.model.facts, len(parts), **how, sampling=settings.sampling.to_dict())
        flat, offsets = flatten(ids)
        drawn = computed_together(
            job,
            {"ids": flat, "offsets": offsets},
            partial(drawn_part, self.model, ids, settings),
            self.context,
            lambda done: on_batch(min(done * len(parts[0]), len(ids))),
        )
        return _in_order(prompts, parts, drawn)


@dataclass(frozen=True)
class RankGenerator:
    """The same model in every rank of a training: each draws its share of the batches, and all have all rows."""

    model: LoadedModel
    shares: Shares
    facts: EngineFacts | None = None

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Sequences:
        """As the protocol, by all ranks together; the same rows as one process draws with these weights, to the bit."""
        ids, size = [prompt.ids for prompt in prompts], self.shares.size
        parts = parts_of(self.model.model, ids, settings.batch_size)
        numbers = share_of(range(len(parts)), size, self.shares.number)
        mine = [NOTHING_DRAWN, *(drawn_part(self.model, ids, settings, number) for number in numbers)]
        found = self.shares.exchanged({name: np.concatenate([part[name] for part in mine]) for name in NOTHING_DRAWN})
        on_batch(len(ids))
        return _in_order(prompts, [part for rank in range(size) for part in share_of(parts, size, rank)], found)


# what a process that draws no batch has drawn, with the types of `drawn_part`
NOTHING_DRAWN: Arrays = {
    "lengths": np.zeros(0, dtype=np.int64),
    "ended": np.zeros(0, dtype=np.bool_),
    "ids": np.zeros(0, dtype=np.int32),
    "logprobs": np.zeros(0, dtype=np.float32),
}


@torch.no_grad()
def drawn_part(
    model: LoadedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings, number: int
) -> Arrays:
    """Part `number` of the prompts' responses: lengths [B], whether each ended [B], ids [T] and log-probs [T]."""
    rows = parts_of(model.model, prompts, settings.batch_size)[number]
    model.model.eval()
    drawn = _drawn_part(model.model, [prompts[row] for row in rows], settings, number)
    ids, offsets = flatten([row.response_ids for row in drawn])
    return {
        "lengths": np.diff(offsets),
        "ended": np.array([row.finish_reason == EOS for row in drawn]),
        "ids": ids,
        "logprobs": np.fromiter((value for row in drawn for value in row.logprobs), dtype=np.float32),
    }


def drawing_of(job: Job, rows: Arrays) -> tuple[list[list[int]], GenerationSettings]:
    """The prompts and settings of a job that draws."""
    prompts = np.split(rows["ids"], rows["offsets"][1:-1])
    sampling = Sampling.model_validate(job.settings["sampling"])
    return [prompt.tolist() for prompt in prompts], GenerationSettings(**{**job.settings, "sampling": sampling})


def _in_order(
    prompts: Sequence[EncodedPrompt], parts: Sequence[NDArray[np.int64]], drawn: Sequence[Arrays]
) -> Sequences:
    """The rows of the prompts, where those of `drawn` follow the prompts' numbers in the parts."""
    numbers = (int(number) for part in parts for number in part)
    rows = dict(zip(numbers, (row for part in drawn for row in _rows(part)), strict=True))
    return as_sequences(prompts, [rows[number] for number in range(len(prompts))])


def _rows(part: Arrays) -> list[Generated]:
    if len(part["lengths"]) == 0:  # which a split would make one row
        return []
    ends = np.cumsum(part["lengths"])[:-1]
    pairs = zip(np.split(part["ids"], ends), np.split(part["logprobs"], ends), part["ended"], strict=True)
    return [Generated(ids.tolist(), values.tolist(), EOS if ended else TRUNCATED) for ids, values, ended in pairs]


def as_sequences(prompts: Sequence[EncodedPrompt], drawn: Sequence[Generated]) -> Sequences:
    """The prompts with their responses, whose log-probs are in `behaviour_logprobs`."""
    sequences = build_sequences(
        [prompt.ids for prompt in prompts],
        [row.response_ids for row in drawn],
        columns={
            "behaviour_logprobs": np.fromiter((value for row in drawn for value in row.logprobs), dtype=np.float32)
        },
        finish_reasons=[row.finish_reason for row in drawn],
        prompt_row_ids=[prompt.row.id for prompt in prompts],
    )
    seen = [prompt.teacher_ids for prompt in prompts if prompt.teacher_ids is not None]
    domains = [prompt.row.teacher_domain for prompt in prompts if prompt.row.teacher_domain is not None]
    return replace(
        sequences,
        teacher_prompts=TeacherPrompts(*flatten(seen)) if seen else None,
        domains=domains if len(domains) == len(prompts) else (),
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """One response for each prompt, in the prompts' order; `on_batch` is told the rows done so far."""
    was_training = model.training
    model.eval()
    results: dict[int, Generated] = {}
    for number, rows in enumerate(parts_of(model, prompts, settings.batch_size)):
        told = partial(_told, on_batch, len(results))
        part = _drawn_part(model, [prompts[row] for row in rows], settings, number, told)
        results.update(zip(rows.tolist(), part, strict=True))
        on_batch(len(results))
    model.train(was_training)
    return [results[row] for row in range(len(prompts))]


def _told(on_batch: Callable[[int], None], before: int, ended: int) -> None:
    on_batch(before + ended)


def _drawn_part(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    number: int,
    on_ended: Callable[[int], None] = lambda ended: None,
) -> list[Generated]:
    """The responses of part `number`, whose prompts these are, longest first; `on_ended` hears how many have ended."""
    vocab = len(model.get_output_embeddings().weight)
    generator = generator_for(settings.seed, settings.scope, number, device=model.device)
    state = BatchState(len(prompts), vocab, settings, generator)
    waiting = Waiting(model, prompts, state.limit, on_ended)
    while waiting.left:
        first = waiting.begun
        prefill = waiting.taken_in(settings.batch_size)
        state.begin(first, waiting.begun - first)
        drawn = state.take(head_logits(model, prefill.hidden))
        if replays(model, prefill.cache):
            draw_replayed(model, prefill, drawn, state, waiting)
        else:
            _draw_growing(model, prefill, drawn, state)
    return state.responses()


def parts_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int) -> list[NDArray[np.int64]]:
    """The prompts' numbers by the part that they are drawn in, longest first: what one process draws by itself.

    A part is a batch; where rows can join a batch as others of it end, those of `JOINING` batches.
    """
    together = JOINING if replays(model, roomy_cache(model.config)) else 1
    return length_sorted_batches([len(prompt) for prompt in prompts], batch_size * together)


def _draw_growing(model: PreTrainedModel, prefill: Prefill, drawn: Tensor, state: BatchState) -> None:
    """The rest of a batch after its prefill, with a cache that grows and loses its finished rows."""
    cache, mask, positions = prefill.cache, prefill.mask, prefill.positions
    while True:
        going = state.going()
        count = int(going.sum())
        if count == 0:
            return
        positions, mask = positions + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if count <= len(going) * (1 - FINISHED_SHARE_TO_DROP):
            kept = going.nonzero()[:, 0]
            keep_rows(cache, kept)
            state.keep(kept)
            drawn, positions, mask = drawn[kept], positions[kept], mask[kept]
        hidden = continued(model, cache, drawn[:, None], mask, positions)
        drawn = state.take(head_logits(model, hidden[:, -1]))
