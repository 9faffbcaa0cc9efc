"""The records next to the shards: the cache's manifest, the rollouts' record, and the tallies that both state."""

from hashlib import blake2b
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from opd_mcp.engine.cache.shards import damaged, read_shards
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.lineage import MANIFEST_FILE, read_manifest
from opd_mcp.schemas.base import Record
from opd_mcp.schemas.cache import (
    BuildLayout,
    CacheManifest,
    EngineGap,
    Hygiene,
    RolloutStatistics,
    ScoreStatistics,
    Shard,
)
from opd_mcp.schemas.identity import EngineFacts, ModelIdentity, TeacherContext
from opd_mcp.schemas.recipes import Sampling

RECORD_FILE = "rollouts.json"


def write_manifest(directory: Path, manifest: CacheManifest) -> None:
    """Write the manifest; it exists only next to complete shards."""
    write_atomic(directory / MANIFEST_FILE, manifest.sealed().to_json(indent=2))


def read_cache(directory: Path) -> tuple[CacheManifest, Sequences]:
    """Manifest and all rows, checked against the shards' hashes and the rows' CRCs."""
    manifest = read_manifest(directory)
    return manifest, read_shards(directory, manifest.shards)


class RolloutRecord(Record):
    """`rollouts.json`: who drew the rollouts, how, and what they look like."""

    behaviour: ModelIdentity
    prompts_sha256: str
    sampling: Sampling
    seed: int
    eos_token_ids: list[int]
    shards: list[Shard]
    layout: BuildLayout
    statistics: RolloutStatistics
    hygiene: Hygiene
    engine_gap: EngineGap | None = None
    generated_by: EngineFacts | None = None
    rescored: bool | None = None
    rendered_at: str | None = None
    teacher_context: TeacherContext | None = None
    """What the prompts show the teacher alone; the shards then have its prompts as well."""


def write_record(directory: Path, record: RolloutRecord) -> None:
    """Write the record; it exists only next to complete shards."""
    write_atomic(directory / RECORD_FILE, record.sealed().to_json(indent=2))


def read_record(directory: Path) -> RolloutRecord:
    """The record of complete rollouts; raises IntegrityError `damaged_file`."""
    try:
        return RolloutRecord.from_json((directory / RECORD_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise damaged(directory / RECORD_FILE, "it is missing or not what was written") from error


def read_rollouts(directory: Path) -> Sequences:
    """All rollouts, checked against their hashes."""
    return read_shards(directory, read_record(directory).shards)


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
