"""The one place where text leaves for agents and the dashboard: without secrets, and with what could act escaped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mcp_types import CallToolResult, TextContent

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.redaction import redacted, redacted_values
from opd_mcp.schemas.texts import LINE_BREAK, escaped
from opd_mcp.server.protocol.json_schema import structured

AnswerT = TypeVar("AnswerT", bound=Schema)


@dataclass(frozen=True)
class Outgoing:
    """What is sent holds none of the `secrets`."""

    secrets: tuple[str, ...] = field(default=(), repr=False)

    def line(self, text: str) -> str:
        """A text of one line: an error, a question, a message."""
        return escaped(redacted(text, self.secrets))

    def document(self, text: str) -> str:
        """A file of ours, whose lines are its own."""
        return escaped(redacted(text, self.secrets), keep=LINE_BREAK)

    def values(self, answer: Schema) -> dict[str, Any]:
        """The answer for programs; JSON marks line breaks itself."""
        values = redacted_values(structured(answer.escaped(keep=LINE_BREAK)), self.secrets)
        assert isinstance(values, dict)
        return values

    def text(self, answer: AnswerT, render: Callable[[AnswerT], str]) -> str:
        """The answer in words: its lines are those of `render`, never those of a value."""
        return redacted(render(answer.escaped()), self.secrets)

    def result(self, answer: AnswerT, render: Callable[[AnswerT], str], *, is_error: bool = False) -> CallToolResult:
        """The answer of a tool call, in words and for programs."""
        content = [TextContent(type="text", text=self.text(answer, render))]
        return CallToolResult(content=content, structured_content=self.values(answer), is_error=is_error)
