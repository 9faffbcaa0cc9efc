"""A teacher in this process: log-probs of given tokens at temperature 1, untruncated."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opd_mcp.engine.data.batches import build_batch, micro_batch_indices
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.rows import target_logprobs
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.rows import head_logits, hidden_rows
from opd_mcp.engine.runtime import Runtime

ROW_TILE_BYTES = 256 * 2**20


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
    tile = max(1, ROW_TILE_BYTES // (4 * teacher.vocab_size))
    everything = np.arange(len(sequences))
    for group in micro_batch_indices(sequences.lengths(), everything, micro_batch_tokens):
        batch = build_batch(sequences, group, runtime.device)
        if len(batch.rows) == 0:
            continue
        places = np.concatenate(
            [np.arange(sequences.response_offsets[row], sequences.response_offsets[row + 1]) for row in group]
        )
        hidden = hidden_rows(teacher.model, batch.input_ids, batch.rows)
        for start in range(0, len(hidden), tile):
            logits = head_logits(teacher.model, hidden[start : start + tile])
            here = places[start : start + tile]
            logprobs[here] = target_logprobs(logits, batch.targets[start : start + tile]).cpu().numpy()
            if topk_ids is not None and topk_logprobs is not None:
                normaliser = logits.logsumexp(dim=-1, keepdim=True)
                best = logits[:, :valid_vocab].topk(topk, dim=-1)
                topk_ids[here] = best.indices.int().cpu().numpy()
                topk_logprobs[here] = (best.values - normaliser).cpu().numpy()
    return TeacherScores(logprobs, topk_ids, topk_logprobs)
