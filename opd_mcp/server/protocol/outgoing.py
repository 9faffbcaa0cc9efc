"""The one place where text leaves for agents and the dashboard: without secrets, and with what could act escaped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mcp_types import CallToolResult, TextContent

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.redaction import redacted, redacted_values
from opd_mcp.schemas.texts import LINE_BREAK, escaped
from opd_mcp.server.protocol.json_schema import structured

HELD = "What was given holds what looks like a secret, and is not shown."
AnswerT = TypeVar("AnswerT", bound=Schema)


@dataclass(frozen=True)
class Outgoing:
    """What is sent holds none of the `secrets`."""

    secrets: tuple[str, ...] = field(default=(), repr=False)

    def line(self, text: str) -> str:
        """A text of one line: an error, a question, a message."""
        return escaped(redacted(text, self.secrets))

    def error(self, error: OpdError) -> str:
        """The error in one line; a part that holds a secret is left out whole.

        An answer with a gap at the right word would tell which of many guesses is the secret.
        """
        value = None if error.value is None or self._holds_secret(error.value) else error.value
        message = HELD if self._holds_secret(error.message) or value != error.value else error.message
        nearest = [name for name in error.nearest if not self._holds_secret(name)]
        fix = "Leave it out." if self._holds_secret(error.fix) else error.fix
        shown = OpdError(error.code, message, value=value, nearest=nearest, fix=fix, call=error.call)
        return self.line(str(shown))

    def _holds_secret(self, text: str) -> bool:
        return any(secret in text for secret in self.secrets)

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
