"""A teacher in this process: log-probs of given tokens at temperature 1, untruncated."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opd_mcp.engine.data.batches import build_batch
from opd_mcp.engine.data.packing import grouped_rows
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.head import row_scores
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.rows import model_head
from opd_mcp.engine.runtime import Runtime


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
        logprobs[batch.places] = scores.logprobs.cpu().numpy()
        if topk_ids is not None and topk_logprobs is not None:
            topk_ids[batch.places] = scores.topk_ids.int().cpu().numpy()
            topk_logprobs[batch.places] = scores.topk_logprobs.cpu().numpy()
    return TeacherScores(logprobs, topk_ids, topk_logprobs)
