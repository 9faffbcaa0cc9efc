"""Secrets removed from everything written or answered: known values, and what looks like a token, key or password."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TextIO
from urllib.parse import quote

HIDDEN = "[redacted]"
SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
# Shorter values (`1`, `true`, a user's name) would blank out ordinary words.
MIN_SECRET_CHARACTERS = 8
_SHAPES = (
    (re.compile(r"\b(?:hf|ghp|gho|glpat|xox[abp])[_-][A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/@'\"]{1,500}@"), rf"\1{HIDDEN}@"),
)


def environment_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of variables with names of secrets, also in their JSON and URL spellings, longest first."""
    found = {value.strip() for name, value in environment.items() if SECRET_NAMES.search(name)}
    # A path points to a secret; it is not the secret.
    long = [value for value in found if len(value) >= MIN_SECRET_CHARACTERS and not value.startswith("/")]
    spelt = {form for value in long for form in (value, json.dumps(value)[1:-1], quote(value, safe=""))}
    return tuple(sorted(spelt, key=len, reverse=True))


def holds_secret(value: Any, secrets: Iterable[str] = ()) -> bool:
    """Whether any text in a JSON-ready value, names included, would be redacted."""
    text = json.dumps(value, ensure_ascii=False)
    return redacted(text, secrets) != text


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the secrets and without anything that looks like a secret."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def redacted_values(value: Any, secrets: Iterable[str] = ()) -> Any:
    """JSON-ready values with every text in them redacted; keys stay."""
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, Mapping):
        return {key: redacted_values(part, secrets) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(part, secrets) for part in value]
    return value


class RedactingStream:
    """A text stream that redacts what is written to it, line by line, so that no secret is split over two writes."""

    def __init__(self, stream: TextIO, secrets: Iterable[str]) -> None:
        self._stream = stream
        self._secrets = tuple(secrets)
        self._rest = ""

    def write(self, text: str) -> int:
        """Pass on the finished lines."""
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._stream.write(redacted(lines + newline, self._secrets))
        return len(text)

    def flush(self) -> None:
        """Pass on all buffered text, also an unfinished line."""
        if self._rest:
            self._stream.write(redacted(self._rest, self._secrets))
            self._rest = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
