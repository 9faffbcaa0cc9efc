"""Pages of a list, newest first: a cursor names the last row of the previous page."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.store.workspace import is_id

Row = TypeVar("Row")
Place = tuple[str, str]
"""Where a row stands in the order of its list: time of creation and id."""


def page_of(
    rows: Sequence[Row], place: Callable[[Row], Place], limit: int, cursor: str | None
) -> tuple[list[Row], str | None]:
    """At most `limit` rows after the cursor, and the cursor of the next page if there is one.

    Raises ArgumentError `invalid_argument` for a cursor that no page gave.
    """
    last_seen = None if cursor is None else _place_of(cursor)
    rest = [row for row in rows if last_seen is None or place(row) < last_seen]
    page = rest[:limit]
    return page, "/".join(place(page[-1])) if page and limit < len(rest) else None


def _place_of(cursor: str) -> Place:
    created_at, _, row_id = cursor.partition("/")
    if _is_time(created_at) and is_id(row_id):
        return created_at, row_id
    raise ArgumentError(
        "invalid_argument",
        "This is not a cursor that a page of this list gave.",
        value=cursor,
        fix="Give next_cursor of the page before, or leave out cursor to begin with the newest.",
    )


def _is_time(text: str) -> bool:
    """Whether a text is a time as records write it, e.g. `2026-08-01T10:00:00.000Z`."""
    try:
        return "T" in text and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
