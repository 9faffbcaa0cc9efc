"""Training checkpoints: what `checkpoint.json` says of the tensors beside it."""

from typing import Literal

from pydantic import Field

from opd_mcp.schemas.base import Schema, content_hash


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


class CheckpointRecord(Schema):
    """`checkpoint.json`; `self_sha256` is over all other fields, so that no flipped byte goes unseen."""

    schema_version: Literal[1] = 1
    fingerprint: str = Field(description="hash of the settings and the parameters' shapes: whose checkpoint this is")
    state: LoopState
    journal_position: int = Field(description="the journal's records up to here were durable when this was written")
    threads: int
    torch: str
    device: str
    files: dict[str, str] = Field(description="sha256 of each file")
    self_sha256: str = ""

    def sealed(self) -> "CheckpointRecord":
        """The record with its own hash."""
        return self.model_copy(update={"self_sha256": self._own_hash()})

    def is_intact(self) -> bool:
        """Whether the record is the one that was sealed."""
        return self.self_sha256 == self._own_hash()

    def _own_hash(self) -> str:
        return content_hash({**self.to_dict(), "self_sha256": ""})
