"""What scoring needs of a teacher, wherever it runs, and the teacher that runs in this process.

All scores are log-probs of given tokens at temperature 1, untruncated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from opd_mcp.engine.data.batches import build_batch, grouped_rows
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.linear_head import row_scores
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.models.loading import LoadedModel, load_model
from opd_mcp.engine.models.lora import adapters
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
    """A teacher whose weights are here."""

    model: LoadedModel
    identity: ModelIdentity
    vocab_size: int
    micro_batch_tokens: int
    runtime: Runtime

    def score(self, sequences: Sequences, topk: int) -> ScoredRows:
        """As the protocol."""
        scores = score_sequences(
            self.model,
            sequences,
            topk=topk,
            micro_batch_tokens=self.micro_batch_tokens,
            runtime=self.runtime,
            valid_vocab=self.model.facts.tokens,
        )
        return ScoredRows(scores)

    def prove(self) -> None:
        """Its weights are in this process: it is who it was."""

    def close(self) -> None:
        """Nothing is open."""


def open_local(path: Path, runtime: Runtime, micro_batch_tokens: int) -> LocalTeacher:
    """The teacher in a model directory; raises what `load_model` raises."""
    model = load_model(path, runtime)
    return LocalTeacher(model, full_identity(path), model.vocab_size, micro_batch_tokens, runtime)


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


@torch.no_grad()
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
    total = len(sequences.response_ids)
    logprobs = np.zeros(total, dtype=np.float32)
    topk_ids = np.zeros((total, topk), dtype=np.int32) if topk else None
    topk_logprobs = np.zeros((total, topk), dtype=np.float32) if topk else None
    head, everything = model_head(teacher.model), np.arange(len(sequences))
    for group in grouped_rows(sequences.lengths(), everything, micro_batch_tokens, packed=packs(teacher.model)):
        batch = build_batch(sequences, group, runtime.device)
        if len(batch.rows) == 0:
            continue
        hidden = hidden_rows(teacher.model, batch.input_ids, batch.lengths, batch.rows)
        scores = row_scores(head, hidden, batch.targets, topk=topk, valid_vocab=valid_vocab)
        logprobs[batch.positions] = scores.logprobs.cpu().numpy()
        if topk_ids is not None and topk_logprobs is not None:
            topk_ids[batch.positions] = scores.topk_ids.int().cpu().numpy()
            topk_logprobs[batch.positions] = scores.topk_logprobs.cpu().numpy()
    return TeacherScores(logprobs, topk_ids, topk_logprobs)


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
