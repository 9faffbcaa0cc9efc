"""Exact reverse KL per token between two models on given sequences."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_mcp.engine.data.batches import build_batch
from opd_mcp.engine.data.packing import grouped_rows
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.rows import head_logits
from opd_mcp.engine.runtime import Runtime

TILE_BYTES = 256 * 2**20
MICRO_BATCH_TOKENS = 16384


def reverse_kl_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(π_θ‖π_T) [R] over the ids that both know, each renormalised to them; logits [R, V] and [R, V']."""
    shared = min(student_logits.shape[1], teacher_logits.shape[1])
    student = torch.log_softmax(student_logits[:, :shared].double(), dim=-1)
    teacher = torch.log_softmax(teacher_logits[:, :shared].double(), dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1)


@torch.no_grad()
def reverse_kl_sums(
    student: LoadedModel, teacher: LoadedModel, sequences: Sequences, runtime: Runtime
) -> NDArray[np.float64]:
    """Σ_t KL(π_θ‖π_T) of each sequence [N], in nats."""
    sums = np.zeros(len(sequences), dtype=np.float64)
    tile = max(1, TILE_BYTES // (8 * 4 * max(student.vocab_size, teacher.vocab_size)))
    packed, everything = packs(student.model) and packs(teacher.model), np.arange(len(sequences))
    for group in grouped_rows(sequences.lengths(), everything, MICRO_BATCH_TOKENS, packed=packed):
        batch = build_batch(sequences, group, runtime.device)
        student_hidden = hidden_rows(student.model, batch.input_ids, batch.lengths, batch.rows)
        teacher_hidden = hidden_rows(teacher.model, batch.input_ids, batch.lengths, batch.rows)
        totals = torch.zeros(len(group), dtype=torch.float64, device=runtime.device)
        for start in range(0, len(batch.rows), tile):
            rows = slice(start, start + tile)
            divergence = reverse_kl_rows(
                head_logits(student.model, student_hidden[rows]), head_logits(teacher.model, teacher_hidden[rows])
            )
            totals.index_add_(0, batch.sequence[rows], divergence)
        sums[group] = totals.cpu().numpy()
    return sums
