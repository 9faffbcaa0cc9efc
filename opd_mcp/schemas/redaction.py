"""Secrets taken out of texts, before they are written or shown: known values, and what has the shape of a secret."""

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO
from urllib.parse import quote

REDACTED = "[redacted]"
MIN_SECRET_CHARACTERS = 8
PREFIX_CHARACTERS = 12
MAX_LINE_CHARACTERS = 64 << 10
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
# Every repetition is of one class of characters that the text around it lacks, so that none of them backtracks.
_SHAPES = (
    (re.compile(r"(?i)\b(bearer|authorization\W{1,4}basic)[ \t]+[a-z0-9._~+/=-]{8,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(?i)(?<![a-z0-9])([a-z][a-z0-9+.-]{1,20}://)[^/\s@\"']{1,1000}@"), rf"\1{REDACTED}@"),
    (re.compile(r"(?i)([?&](?:(?:access_)?token|(?:api_?)?key|sig|secret|password)=)[^&#\s\"']+"), rf"\1{REDACTED}"),
    (
        re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|sk-|AKIA)[A-Za-z0-9_-]{16,}"),
        REDACTED,
    ),
)


@dataclass(frozen=True)
class Redactor:
    """Takes `secrets` out of texts, in their JSON and URL spellings too, and whatever is shaped like a secret."""

    secrets: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        known = {form for secret in self.secrets if len(secret) >= MIN_SECRET_CHARACTERS for form in _spellings(secret)}
        found = re.compile("|".join(map(_pattern, sorted(known, key=len, reverse=True)))) if known else None
        object.__setattr__(self, "_known", found)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], *others: str | None) -> "Redactor":
        """For the variables whose names end like a secret's (`HF_TOKEN`, `OPENAI_API_KEY`, …), and other values."""
        named = [value for name, value in environment.items() if _SECRET_NAME.search(name)]
        # What stands in such a variable may be the path of a file with the secret.
        values = [value.strip() for value in named if not value.startswith("/")]
        return cls(tuple(dict.fromkeys([*values, *(other for other in others if other)])))

    def text(self, text: str) -> str:
        """The text without secrets; a secret of which only the beginning is left is taken out too."""
        known: re.Pattern[str] | None = self._known  # type: ignore[attr-defined]
        text = known.sub(REDACTED, text) if known else text
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
        return text

    def value(self, value: Any) -> Any:
        """JSON-ready values with every text in them, names included, without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(part) for part in value]
        return value

    def holds_secret(self, value: Any) -> bool:
        """Whether any text in a JSON-ready value would be changed."""
        return bool(self.value(value) != value)


NO_SECRETS_KNOWN = Redactor()
"""For texts of whoever knows no secrets: only their shapes are found."""


class RedactedStream(io.TextIOBase):
    """A text stream that passes on whole lines without secrets; part of a line is passed on when flushed."""

    def __init__(self, stream: TextIO, redactor: Redactor) -> None:
        self._stream, self._redactor, self._pending = stream, redactor, ""

    def write(self, text: str) -> int:
        """Take in a text; lines go on as soon as they are whole."""
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if len(self._pending) > MAX_LINE_CHARACTERS:
            lines, newline, self._pending = self._pending, "", ""
        if lines or newline:
            self._stream.write(self._redactor.text(lines) + newline)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Pass on what is left of the last line."""
        self._stream.write(self._redactor.text(self._pending))
        self._pending = ""
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor below; what is written to it directly is not looked at."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """As the stream below says."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As the stream below says."""
        return self._stream.encoding


@contextmanager
def redacted_output(redactor: Redactor) -> Iterator[None]:
    """Nothing that Python prints inside, tracebacks and log lines among it, holds a secret."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (RedactedStream(stream, redactor) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _spellings(secret: str) -> set[str]:
    quoted = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    return {secret, *quoted, quote(secret, safe="")}


def _pattern(secret: str) -> str:
    """The secret, or the beginning of it that a message cut short still has."""
    whole = re.escape(secret)
    if len(secret) <= PREFIX_CHARACTERS:
        return whole
    return rf"{whole}|{re.escape(secret[:PREFIX_CHARACTERS])}[\w.~+/=-]*"
