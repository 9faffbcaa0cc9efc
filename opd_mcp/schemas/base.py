"""The base of every model that crosses a border: strict, immutable, serialised without nulls."""

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A strict, immutable record: unknown fields are errors, and absent values are absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null", protected_namespaces=())

    def to_json(self, *, indent: int | None = None) -> str:
        """The record as JSON text without null fields."""
        return self.model_dump_json(exclude_none=True, indent=indent)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values without null fields."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The record that `to_json` wrote; raises pydantic's ValidationError for anything else."""
        return cls.model_validate_json(text)

    def content_hash(self) -> str:
        """sha256 (hex) of the record's canonical JSON: equal content, equal hash."""
        return content_hash(self.to_dict())


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON-ready value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
