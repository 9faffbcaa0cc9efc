"""Training checkpoints: what `checkpoint.json` says of the tensors beside it."""

from pydantic import Field

from opd_mcp.schemas.base import Record, Schema


class LoopState(Schema):
    """Where a training loop stands between two steps; times in seconds, over all attempts."""

    step: int = Field(0, description="steps taken; the next one is this step, counted from 0")
    micro_batch_tokens: int
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    seconds_generation: float = 0.0
    seconds_scoring: float = 0.0
    parts: dict[str, float] = Field(default_factory=dict, description="seconds by part of a step")
    recent: list[dict[str, float]] = Field(default_factory=list, description="metrics of the last steps")


class CheckpointRecord(Record):
    """`checkpoint.json`."""

    fingerprint: str = Field(description="hash of the settings and the parameters' shapes: whose checkpoint this is")
    state: LoopState
    journal_position: int = Field(description="the journal's records up to here were durable when this was written")
    threads: int
    torch: str
    device: str
    files: dict[str, str] = Field(description="sha256 of each file")
