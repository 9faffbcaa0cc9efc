"""What scoring needs of a teacher, wherever it runs, and the teacher that runs here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.models.loading import LoadedModel, load_model
from opd_mcp.engine.provenance import full_identity
from opd_mcp.engine.runtime import Runtime, open_runtime
from opd_mcp.engine.teachers.local import TeacherScores, score_sequences
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import RuntimeRecipe

# a log-prob may exceed 0 by rounding only
ROUNDING = 1e-4


@dataclass(frozen=True)
class RowScores:
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

    def score(self, sequences: Sequences, topk: int) -> RowScores:
        """Scores of every row; raises OpdError when no row can be scored any more."""

    def close(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True)
class LocalTeacher:
    """A teacher whose weights are here."""

    model: LoadedModel
    identity: ModelIdentity
    vocab_size: int
    micro_batch_tokens: int
    runtime: Runtime

    def score(self, sequences: Sequences, topk: int) -> RowScores:
        """As the protocol."""
        scores = score_sequences(
            self.model,
            sequences,
            topk=topk,
            micro_batch_tokens=self.micro_batch_tokens,
            runtime=self.runtime,
            valid_vocab=self.model.facts.tokens,
        )
        return RowScores(scores)

    def close(self) -> None:
        """Nothing is open."""


def open_local(path: Path, runtime: Runtime, micro_batch_tokens: int) -> LocalTeacher:
    """The teacher in a model directory; raises as `load_model`."""
    model = load_model(path, runtime)
    return LocalTeacher(model, full_identity(path), model.vocab_size, micro_batch_tokens, runtime)


def rescorer(path: Path) -> Callable[[Sequences, int], NDArray[np.float32]]:
    """What `cache verify` asks for: from rows and k to the log-probs that the teacher in a directory gives them."""
    teacher = open_local(path, open_runtime(RuntimeRecipe()), 16384)
    return lambda rows, topk: teacher.score(rows, 0).scores.logprobs
