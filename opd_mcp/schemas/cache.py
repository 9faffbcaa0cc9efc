"""The teacher cache's manifest: what is in the shards, who made it, and what it looks like in numbers."""

from typing import Literal

from pydantic import Field

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.recipes import Sampling


class Shard(Schema):
    """One Parquet file of the cache."""

    file: str
    rows: int
    tokens: int = Field(description="response tokens")
    sha256: str


class RolloutStatistics(Schema):
    """What the rollouts look like; each value over all rows of the data set."""

    rows: int
    response_tokens: int
    mean_response_tokens: float
    truncated_fraction: float
    eos_fraction: float
    empty_responses: int
    duplicate_rows: int


class ScoreStatistics(Schema):
    """Teacher against behaviour policy, per token of the rollouts, in nats."""

    mean_teacher_logprob: float
    mean_behaviour_logprob: float
    reverse_kl_k1: float = Field(description="mean(behaviour − teacher log-prob) on the behaviour's own tokens")
    reverse_kl_k3: float
    clamped_values: int = 0


class CacheManifest(Schema):
    """`manifest.json` of a teacher cache."""

    schema_version: Literal[1] = 1
    teacher: ModelIdentity
    behaviour: ModelIdentity
    sft_teacher: TeacherClaim | None = Field(None, description="the behaviour policy's SFT teacher")
    teacher_mismatch_allowed: bool = False
    prompts_sha256: str
    sampling: Sampling
    seed: int
    eos_token_ids: list[int]
    topk: int
    dtype: Literal["float32", "float16"]
    vocab_size: int
    shards: list[Shard]
    rollouts: RolloutStatistics
    scores: ScoreStatistics
