"""What several texts are made of: the line with the next step, joined facts, values as short JSON."""

import json
from typing import Any

from opd_mcp.schemas.next_action import CallText, NextAction, advice_text
from opd_mcp.schemas.runs import Progress
from opd_mcp.schemas.texts import shortened
from opd_mcp.server.protocol.json_schema import known

JSON_CHARACTERS = 3_000


def next_line(action: NextAction, call_text: CallText = NextAction.call_text) -> str:
    """The next step as the last line of a text."""
    return f"next: {advice_text(action.why, action, call_text)}"


def facts(*parts: str | Progress | None) -> str:
    """The parts that are known, e.g. `run-7f3a, distill, running, 120/400 steps`."""
    return ", ".join(
        f"{part.done}/{part.total} {part.unit}" if isinstance(part, Progress) else part for part in parts if part
    )


def compact(value: Any, characters: int = JSON_CHARACTERS) -> str:
    """The value as JSON without nulls or spaces, cut to so many characters with a word on where the rest is."""
    text = json.dumps(known(value), ensure_ascii=False, separators=(",", ":"), default=str)
    return shortened(text, characters, "the structured answer has all of it")
