"""From a record to what is sent: JSON values without nulls and without numbers that JSON does not have."""

import math
from typing import Any

from opd_mcp.schemas.base import Schema


def structured(record: Schema) -> dict[str, Any]:
    """The record as JSON-ready values; what is unknown (null, NaN, infinite) is left out."""
    values = known(record.model_dump(mode="json", exclude_none=True))
    assert isinstance(values, dict)
    return values


def known(value: Any) -> Any:
    """The value without unknown entries; in a list an unknown entry stays as null, to keep positions."""
    if isinstance(value, dict):
        return {key: known(part) for key, part in value.items() if not _is_unknown(part)}
    if isinstance(value, list | tuple):
        return [None if _is_unknown(part) else known(part) for part in value]
    return value


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
