"""What `opd-mcp gc` answers: what nobody needs, and what was kept for want of certainty."""

from typing import Literal

from pydantic import Field

from opd_mcp.schemas.base import Schema


class Leftover(Schema):
    """Something that nobody needs."""

    kind: Literal["build", "deleted", "temporary", "checkpoints", "index", "artifact"]
    path: str
    bytes: int


class GarbageReport(Schema):
    """What is, or was, removed; `bytes` is their sum."""

    removed: bool
    bytes: int
    items: list[Leftover]
    kept: list[str] = Field(default_factory=list, description="what could not be judged, and why")
