"""What scoring needs of a teacher, wherever it runs, and the teacher that runs in this process.

All scores are log-probs of given tokens at temperature 1, untruncated.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.batches import Group, build_batch, grouped_rows
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.linear_head import row_scores
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.models.loading import LoadedModel, load_model
from opd_mcp.engine.models.lora import adapters
from opd_mcp.engine.parts import Arrays, Job, Shares, computed_together, share_of
from opd_mcp.engine.provenance import full_identity
from opd_mcp.engine.runtime import Runtime, open_runtime
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.cache import EngineGap
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import RuntimeRecipe

# a log-prob may exceed 0 by rounding only
ROUNDING = 1e-4
GAP_ROWS = 16
# Parts of a scoring per process: the last ones to be done are short.
PARTS_EACH = 8


@dataclass(frozen=True)
class TeacherScores:
    """Flat over all response tokens: log π_T [T] float32; the teacher's top k [T, k], ids int32, log-probs float32."""

    logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32] | None
    topk_logprobs: NDArray[np.float32] | None

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The scores under their names in the teacher cache."""
        columns: dict[str, NDArray[np.generic]] = {"teacher_logprobs": self.logprobs}
        if self.topk_ids is not None and self.topk_logprobs is not None:
            columns |= {"topk_ids": self.topk_ids, "topk_logprobs": self.topk_logprobs}
        return columns


@dataclass(frozen=True)
class ScoredRows:
    """Scores of all rows; `refused` names, by row, those that the teacher could not score."""

    scores: TeacherScores
    refused: Mapping[int, str] = field(default_factory=dict)

    def bad_rows(self, sequences: Sequences) -> dict[int, str]:
        """Why a row cannot be used, by row: refused, or with a log-prob that is none."""
        bad = dict(self.refused)
        for row in range(len(sequences)):
            here = slice(*sequences.response_offsets[row : row + 2])
            values = [self.scores.logprobs[here], sequences.columns["behaviour_logprobs"][here]]
            if self.scores.topk_logprobs is not None:
                values.append(self.scores.topk_logprobs[here].ravel())
            joined = np.concatenate(values)
            if row not in bad and not np.isfinite(joined).all():
                bad[row] = "log-prob is not finite"
            if row not in bad and (joined > ROUNDING).any():
                bad[row] = "log-prob above 0"
        return bad


class Teacher(Protocol):
    """log π_T of given tokens at temperature 1, untruncated."""

    @property
    def identity(self) -> ModelIdentity:
        """Who it is."""

    @property
    def vocab_size(self) -> int:
        """V of its head, padding included."""

    def score(self, sequences: Sequences, topk: int) -> ScoredRows:
        """Scores of every row; raises OpdError when the teacher has become unusable."""

    def prove(self) -> None:
        """Raise ConsistencyError `teacher_untrue` when it is no longer the teacher that was opened."""

    def close(self) -> None:
        """Close its connections."""


@dataclass(frozen=True)
class LocalTeacher:
    """A teacher whose weights are here, and in the helpers that its context has."""

    model: LoadedModel
    identity: ModelIdentity
    vocab_size: int
    micro_batch_tokens: int
    runtime: Runtime
    context: Context | None = None

    def score(self, sequences: Sequences, topk: int) -> ScoredRows:
        """As the protocol; the same scores with and without helpers, to the bit."""
        how = Scoring(topk, self.micro_batch_tokens, self.model.facts.tokens)
        if self.context is None or self.context.helpers is None:
            return ScoredRows(_filled(sequences, topk, scored_groups(self.model, sequences, how, self.runtime)))
        parts = min(len(how.groups(self.model, sequences)), PARTS_EACH * (1 + self.context.helpers.count))
        job = Job.of("score", self.model.facts, parts, **vars(how))
        found = computed_together(
            job,
            {name: getattr(sequences, name) for name in ROWS},
            partial(scored_part, self.model, sequences, job, self.runtime),
            self.context,
        )
        return ScoredRows(_filled(sequences, topk, (_scores(part) for part in found)))

    def prove(self) -> None:
        """Its weights are in this process: it is who it was."""

    def close(self) -> None:
        """Nothing is open."""


def open_local(path: Path, runtime: Runtime, micro_batch_tokens: int, context: Context | None = None) -> LocalTeacher:
    """The teacher in a model directory, shared with the context's helpers; raises what `load_model` raises."""
    model = load_model(path, runtime)
    return LocalTeacher(model, full_identity(path), model.vocab_size, micro_batch_tokens, runtime, context)


def base_as_teacher(student: LoadedModel, teacher: Path, runtime: Runtime) -> LoadedModel | None:
    """The student's module as this teacher, where its frozen base is the teacher, byte for byte, in the same dtype.

    It computes the teacher's log-probs inside `without_adapters`, to the bit. None: the teacher must be loaded.
    """
    layers, base = adapters(student.model).values(), student.facts.weights_path
    if not layers or any(getattr(layer.weight, "dtype", None) is not runtime.dtype for layer in layers):
        return None
    mine, theirs = full_identity(base), full_identity(teacher)
    if not mine.same_model(theirs) or mine.weights_full != theirs.weights_full:
        return None
    return replace(student, facts=inspect_model(teacher), path=teacher)


def rescorer(path: Path) -> Callable[[Sequences, int], NDArray[np.float32]]:
    """What `cache verify` asks for: from rows and k to the log-probs that the teacher in a directory gives them."""
    teacher = open_local(path, open_runtime(RuntimeRecipe()), 16384)
    return lambda rows, topk: teacher.score(rows, 0).scores.logprobs


@dataclass(frozen=True)
class Scoring:
    """What is asked of each token: its log-prob and the top k; ids at or above `valid_vocab` are in no top k."""

    topk: int
    micro_batch_tokens: int
    valid_vocab: int | None = None

    def groups(self, teacher: LoadedModel, sequences: Sequences) -> list[Group]:
        """The micro-batches of all rows."""
        rows = np.arange(len(sequences))
        return grouped_rows(sequences.lengths(), rows, self.micro_batch_tokens, packed=packs(teacher.model))


def score_sequences(
    teacher: LoadedModel,
    sequences: Sequences,
    *,
    topk: int,
    micro_batch_tokens: int,
    runtime: Runtime,
    valid_vocab: int | None = None,
) -> TeacherScores:
    """log π_T of every response token, and its top k, in the order of `sequences`.

    Ids at or above `valid_vocab` (a padded vocabulary's tail) are left out of the top k, never out of the softmax.
    """
    return scored_in_shares(teacher, sequences, Scoring(topk, micro_batch_tokens, valid_vocab), runtime, None)


# the flat places of some response tokens [t], and their scores
Scored = tuple[NDArray[np.int64], TeacherScores]
# of the rows, what a scoring depends on
ROWS = ("prompt_ids", "prompt_offsets", "response_ids", "response_offsets")


def scored_part(teacher: LoadedModel, sequences: Sequences, job: Job, runtime: Runtime, number: int) -> Arrays:
    """The scores of the tokens of a part of the job's micro-batches, as arrays: `positions` [t] and columns."""
    how = Scoring(**job.settings)
    groups = share_of(how.groups(teacher, sequences), job.parts, number)
    return _stacked([*scored_groups(teacher, sequences, how, runtime, groups)], how.topk)


def scored_in_shares(
    teacher: LoadedModel, sequences: Sequences, how: Scoring, runtime: Runtime, shares: Shares | None
) -> TeacherScores:
    """As `score_sequences`; with `shares` each rank scores its share of the micro-batches, and all have all scores.

    They are the same to the bit for any number of ranks.
    """
    if shares is None:
        return _filled(sequences, how.topk, scored_groups(teacher, sequences, how, runtime))
    groups = share_of(how.groups(teacher, sequences), shares.size, shares.number)
    mine = _stacked([*scored_groups(teacher, sequences, how, runtime, groups)], how.topk)
    return _filled(sequences, how.topk, (_scores(part) for part in shares.exchanged(mine)))


def _stacked(found: Sequence[Scored], topk: int) -> Arrays:
    """Scores of several micro-batches as arrays: `positions` [t] and columns."""
    if not found:  # rows without a response
        return {"positions": np.zeros(0, dtype=np.int64), **_zeros(0, topk).columns()}
    columns = [scores.columns() for _, scores in found]
    return {
        "positions": np.concatenate([positions for positions, _ in found]),
        **{name: np.concatenate([each[name] for each in columns]) for name in columns[0]},
    }


def rows_to_score(rows: Arrays) -> Sequences:
    """The rows of a job that scores."""
    prompt_ids, prompt_offsets, response_ids, response_offsets = (rows[name] for name in ROWS)
    return Sequences(prompt_ids, prompt_offsets, response_ids, response_offsets)


@torch.no_grad()
def scored_groups(
    teacher: LoadedModel,
    sequences: Sequences,
    how: Scoring,
    runtime: Runtime,
    groups: Iterable[Group] | None = None,
) -> Iterator[Scored]:
    """The scores of each of these micro-batches, by default of all, that has a response token."""
    head = model_head(teacher.model)
    for group in how.groups(teacher, sequences) if groups is None else groups:
        batch = build_batch(sequences, group, runtime.device)
        if len(batch.rows) == 0:
            continue
        hidden = hidden_rows(teacher.model, batch.input_ids, batch.lengths, batch.rows)
        scores = row_scores(head, hidden, batch.targets, topk=how.topk, valid_vocab=how.valid_vocab)
        ids = scores.topk_ids.int().cpu().numpy() if how.topk else None
        logprobs = scores.topk_logprobs.cpu().numpy() if how.topk else None
        yield batch.positions, TeacherScores(scores.logprobs.cpu().numpy(), ids, logprobs)


def _scores(part: Arrays) -> Scored:
    return part["positions"], TeacherScores(part["teacher_logprobs"], part.get("topk_ids"), part.get("topk_logprobs"))


def _zeros(tokens: int, topk: int) -> TeacherScores:
    ids = np.zeros((tokens, topk), dtype=np.int32) if topk else None
    logprobs = np.zeros((tokens, topk), dtype=np.float32) if topk else None
    return TeacherScores(np.zeros(tokens, dtype=np.float32), ids, logprobs)


def _filled(sequences: Sequences, topk: int, found: Iterable[Scored]) -> TeacherScores:
    """The scores of all tokens of the rows, put together."""
    whole = _zeros(len(sequences.response_ids), topk)
    for positions, scores in found:
        whole.logprobs[positions] = scores.logprobs
        if whole.topk_ids is not None and whole.topk_logprobs is not None:
            assert scores.topk_ids is not None, "every micro-batch has its top k"
            whole.topk_ids[positions], whole.topk_logprobs[positions] = scores.topk_ids, scores.topk_logprobs
    return whole


def engine_gap(model: LoadedModel, drawn: Sequences, runtime: Runtime, dtype: str | None = None) -> EngineGap | None:
    """How far the generator's log-probs are from the scorer's, on the first rows; None when they hold no token.

    `dtype` is what the generator computes in, where that is another than the model's.
    Raises RunError `engine_disagrees` where rounding cannot explain the difference.
    """
    sample = drawn.slice(0, min(GAP_ROWS, len(drawn)))
    if len(sample.response_ids) == 0:
        return None
    was_training = model.model.training
    model.model.eval()
    scores = score_sequences(model, sample, topk=0, micro_batch_tokens=4096, runtime=runtime)
    model.model.train(was_training)
    difference = np.abs(scores.logprobs.astype(np.float64) - sample.columns["behaviour_logprobs"].astype(np.float64))
    gap = EngineGap(tokens=len(difference), mean=float(difference.mean()), largest=float(difference.max()))
    require_agreement(gap, dtype or str(model.model.dtype).removeprefix("torch."))
    return gap


def require_agreement(gap: EngineGap | None, dtype: str | None = None) -> None:
    """Raise RunError `engine_disagrees` for a gap, of a model in `dtype`, that rounding cannot explain."""
    if gap is None or gap.mean <= gap.bound(dtype):  # NaN is not at most anything
        return
    raise RunError(
        "engine_disagrees",
        f"The generator's log-probs of its own tokens differ from the scorer's by {gap.mean:.2g} nats on average, more "
        f"than the {gap.bound(dtype):g} that rounding explains: one of the two does not compute this model.",
        value=gap.mean,
        fix="Set 'runtime.dtype' to 'float32' to see whether it is rounding after all; else give a model of another "
        "architecture (docs/data.md lists those that were tried).",
    )
