"""What a cache looks like in numbers."""

from hashlib import blake2b

import numpy as np

from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences
from opd_mcp.schemas.cache import RolloutStatistics, ScoreStatistics

# below this float16 has no finite neighbour worth keeping, and an advantage is clipped long before
LEAST_FLOAT16_LOGPROB = -1e4


class RolloutTally:
    """Adds up rollouts shard by shard."""

    def __init__(self) -> None:
        self._rows = self._tokens = self._truncated = self._ended = self._empty = 0
        self._seen: set[bytes] = set()

    def add(self, rollouts: Sequences) -> None:
        """Count these rows."""
        lengths, reasons = rollouts.response_lengths(), np.asarray(rollouts.finish_reasons)
        self._rows += len(rollouts)
        self._tokens += int(lengths.sum())
        self._truncated += int((reasons == TRUNCATED).sum())
        self._ended += int((reasons == EOS).sum())
        self._empty += int((lengths <= (reasons == EOS)).sum())  # nothing at all, or the end and nothing before it
        for row in range(len(rollouts)):
            content = rollouts.prompt(row).tobytes() + b"|" + rollouts.response(row).tobytes()
            self._seen.add(blake2b(content, digest_size=16).digest())

    def statistics(self) -> RolloutStatistics:
        """The counts and means over all rows added."""
        return RolloutStatistics(
            rows=self._rows,
            response_tokens=self._tokens,
            mean_response_tokens=self._tokens / self._rows,
            truncated_fraction=self._truncated / self._rows,
            eos_fraction=self._ended / self._rows,
            empty_responses=self._empty,
            duplicate_rows=self._rows - len(self._seen),
        )


class ScoreTally:
    """Adds up teacher and behaviour log-probs shard by shard, in float64."""

    def __init__(self) -> None:
        self._tokens = self._clamped = 0
        self._teacher = self._behaviour = self._k3 = 0.0

    def add(self, scored: Sequences, clamped_values: int) -> None:
        """Count the tokens of these rows."""
        teacher = scored.columns["teacher_logprobs"].astype(np.float64)
        behaviour = scored.columns["behaviour_logprobs"].astype(np.float64)
        difference = teacher - behaviour
        self._tokens += len(teacher)
        self._clamped += clamped_values
        self._teacher += float(teacher.sum())
        self._behaviour += float(behaviour.sum())
        self._k3 += float((np.exp(np.minimum(difference, 20)) - difference - 1).sum())

    def statistics(self) -> ScoreStatistics:
        """The means over all tokens added."""
        tokens = max(1, self._tokens)
        return ScoreStatistics(
            mean_teacher_logprob=self._teacher / tokens,
            mean_behaviour_logprob=self._behaviour / tokens,
            reverse_kl_k1=(self._behaviour - self._teacher) / tokens,
            reverse_kl_k3=self._k3 / tokens,
            clamped_values=self._clamped,
        )


def compacted(sequences: Sequences, dtype: str) -> tuple[Sequences, int]:
    """Float columns in the stored dtype, and how many values were clamped to fit float16."""
    if dtype == "float32":
        return sequences, 0
    clamped, columns = 0, {}
    for name, values in sequences.columns.items():
        if values.dtype.kind == "f":
            clamped += int(np.count_nonzero(np.less(values, LEAST_FLOAT16_LOGPROB)))
            columns[name] = np.maximum(values, LEAST_FLOAT16_LOGPROB).astype(np.float16)
    return sequences.with_columns(**columns), clamped
