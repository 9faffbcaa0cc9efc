"""The teacher cache's manifest: what is in the shards, which models made them, and their statistics."""

from typing import Literal

from pydantic import Field

from opd_mcp.schemas.base import Record, Schema, unchanged
from opd_mcp.schemas.identity import EngineFacts, ModelIdentity, TeacherClaim
from opd_mcp.schemas.recipes import Sampling


class Shard(Schema):
    """One Parquet file of the cache."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$", description="a name next to the manifest")
    rows: int
    tokens: int = Field(description="response tokens")
    prompt_tokens: int
    sha256: str


class RolloutStatistics(Schema):
    """Statistics of the rollouts; each value over all rows of the data set."""

    rows: int
    response_tokens: int
    mean_response_tokens: float
    truncated_fraction: float
    eos_fraction: float
    empty_responses: int = Field(description="no token but the end")
    duplicate_rows: int


class ScoreStatistics(Schema):
    """Teacher against behaviour policy, per token of the rollouts, in nats."""

    mean_teacher_logprob: float
    mean_behaviour_logprob: float | None = None
    reverse_kl_k1: float | None = Field(
        None, description="mean(behaviour − teacher log-prob) on the behaviour's tokens"
    )
    reverse_kl_k3: float | None = None
    clamped_values: int = 0


class BuildLayout(Schema):
    """How rows are divided into shards: shard n has rows n·shard_rows …, drawn with its own random streams."""

    rows: int
    shard_rows: int
    batch_size: int
    seed: int


class PromptHygiene(Schema):
    """Counts of duplicate, over-long and overlapping prompts."""

    prompts: int = 0
    over_long_prompts: int = Field(0, description="left out: empty, or over prompting.max_prompt_tokens")
    duplicate_prompts: int = 0
    eval_overlap_exact: int | None = Field(None, description="prompts also in the evaluation set; absent: none given")
    eval_overlap_normalised: int | None = Field(None, description="the same without case, spaces and punctuation")


class Hygiene(PromptHygiene):
    """Counts of irregular prompts and rollouts; every row left out of a cache is counted here."""

    on_truncated: Literal["keep", "drop", "cap"] = "keep"
    truncated_dropped: int = 0
    truncated_capped: int = 0
    quarantined: dict[str, int] = Field(default_factory=dict, description="rows left out, by reason")


COARSEST_DTYPE = "bfloat16"
# Nats, by what the model computes in: measured in docs/reliability.md.
ENGINE_GAP_BOUNDS = {"float32": 0.01, COARSEST_DTYPE: 0.2}


class EngineGap(Schema):
    """|log-prob of the generating engine − that of the scorer| for the same model, on a sample of rollouts."""

    tokens: int
    mean: float
    largest: float

    def bound(self, dtype: str | None = None) -> float:
        """The largest `mean` that rounding explains, in nats; without a `dtype` that of the coarsest."""
        return ENGINE_GAP_BOUNDS.get(dtype or COARSEST_DTYPE, ENGINE_GAP_BOUNDS[COARSEST_DTYPE])


class TeacherDelta(Schema):
    """Δ = log π of the SFT teacher − log π of this teacher, on a sample of rollouts; 0 when consistent."""

    sft_teacher: str
    basis: Literal["measured", "by_construction"] = Field(
        "measured", description="by_construction: both are proven to be the same weights, so Δ is 0 without a sample"
    )
    rows: int
    tokens: int
    mean_abs: float
    over_one_nat: float = Field(description="fraction of tokens with |Δ| > 1")


class CacheManifest(Record):
    """`manifest.json` of a teacher cache."""

    upgrades = (unchanged,)  # 2: sealed
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
    content_sha256: str = Field("", description="over ids, log-probs and reasons of all rows, however they are stored")
    layout: BuildLayout | None = None
    rollouts: RolloutStatistics = Field(description="as drawn, before any row was left out")
    scores: ScoreStatistics
    domains: dict[str, int] | None = Field(None, description="rows by the domain of their teacher, where they have one")
    hygiene: Hygiene = Hygiene()
    engine_gap: EngineGap | None = None
    generated_by: EngineFacts | None = Field(None, description="absent: this program's own engine")
    rescored: bool | None = Field(None, description="whether behaviour log-probs are this program's, not the engine's")
    scored_by: EngineFacts | None = Field(None, description="absent: this program's own engine, or a teacher's server")
    scorer_gap: EngineGap | None = Field(
        None, description="|log-prob of the scoring engine − that of the teacher here|, on a sample of rollouts"
    )
    rendered_at: str | None = Field(
        None, description="what a chat template with a clock showed; absent for one without"
    )
    teacher_delta: TeacherDelta | None = Field(None, description="absent where the SFT teacher was not at hand")
    lacks: list[str] = Field(default_factory=list, description="what a converted cache does not have")

    @property
    def has_behaviour(self) -> bool:
        """Whether the behaviour policy's log-probs are stored; a converted cache has none."""
        return "behaviour_logprobs" not in self.lacks

    @property
    def rows(self) -> int:
        """Rows in the shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Response tokens in the shards."""
        return sum(shard.tokens for shard in self.shards)


class SampleRow(Schema):
    """A row to read: texts cut, and (token, teacher's log-prob, student's log-prob) of its first and last tokens."""

    prompt: str
    response: str
    finish_reason: str
    response_tokens: int
    tokens: list[tuple[str, float, float] | tuple[str, float]]


class CacheInspection(Schema):
    """The answer of `inspect_cache`."""

    path: str
    bytes: int
    rows: int
    tokens: int
    manifest: CacheManifest = Field(description="without the list of shards")
    shards: int
    sample: list[SampleRow]
