"""Prompts and responses as typed rows, checked before any work starts."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from opd_mcp.identity.data_files import data_file, is_parquet, malformed_line, parquet_header, read_rows
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import DataError

PROMPT_COLUMNS = ("id", "prompt", "messages", "answer")
RESPONSE_COLUMNS = (*PROMPT_COLUMNS, "response", "response_ids", "prompt_ids")


@dataclass(frozen=True)
class PromptRow:
    """One prompt: exactly one of `prompt` and `messages` is set; `id` is the file's, or the row number from 0."""

    id: str
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: str | None = None

    def text(self) -> str:
        """The prompt for showing to people: the text, or the last message's."""
        return self.prompt if self.prompt is not None else str((self.messages or ({},))[-1].get("content", ""))


@dataclass(frozen=True)
class ResponseRow:
    """A prompt with the response to learn: text, token ids, or both."""

    prompt: PromptRow
    response: str | None = None
    response_ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ResponsesHeader:
    """What a responses file holds, before it is read for training."""

    file: Path
    rows: int
    has_text: bool
    has_ids: bool


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a .jsonl or .parquet file, or of a directory with one; unknown fields are ignored.

    Raises PathError `not_found`; DataError `malformed_line` or `missing_field` with file and line, `empty_data`,
    `unknown_format`; IntegrityError `damaged_file`. A .jsonl file needs nothing but the standard library.
    """
    file = data_file(path)
    rows = [_prompt_row(file, line, row, index) for index, (line, row) in enumerate(read_rows(file, PROMPT_COLUMNS))]
    return _not_empty(file, rows)


def read_responses(path: Path) -> list[ResponseRow]:
    """Prompts with their responses: `response` (text) or `response_ids` in each row; raises as `read_prompts`."""
    file = data_file(path)
    rows = [
        _response_row(file, line, row, index) for index, (line, row) in enumerate(read_rows(file, RESPONSE_COLUMNS))
    ]
    return _not_empty(file, rows)


def read_responses_header(path: Path) -> ResponsesHeader:
    """Row count and kind of a responses file, JSONL checked row by row; raises as `read_prompts`."""
    file = data_file(path)
    if is_parquet(file):
        count, columns = parquet_header(file)
        has_text, has_ids = "response" in columns, "response_ids" in columns
        if not (has_text or has_ids):
            raise _missing(file, 1, "response")
        if not count:
            _not_empty(file, [])
    else:
        rows = read_responses(file)
        count = len(rows)
        has_text = all(row.response is not None for row in rows)
        has_ids = all(row.response_ids is not None for row in rows)
    return ResponsesHeader(file, count, has_text, has_ids)


def prompts_hash(rows: list[PromptRow]) -> str:
    """sha256 (hex) of prompts with their ids and answers, in order, whatever file they come from."""
    return content_hash([[row.id, row.prompt, row.messages, row.answer] for row in rows])


def _prompt_row(file: Path, line: int, row: dict[str, Any], index: int) -> PromptRow:
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None and messages is None:
        raise _missing(file, line, "prompt")
    if prompt is not None and messages is not None:
        raise malformed_line(file, line, "both prompt and messages are set", fix="Keep one of the two fields.")
    return PromptRow(
        id=_scalar_text(file, line, "id", row.get("id", index)),
        prompt=None if prompt is None else _text(file, line, "prompt", prompt),
        messages=None if messages is None else _messages(file, line, messages),
        answer=None if row.get("answer") is None else _scalar_text(file, line, "answer", row["answer"]),
    )


def _response_row(file: Path, line: int, row: dict[str, Any], index: int) -> ResponseRow:
    response = row.get("response")
    ids = _token_ids(file, line, "response_ids", row.get("response_ids"))
    if response is None and ids is None:
        raise _missing(file, line, "response")
    return ResponseRow(
        prompt=_prompt_row(file, line, row, index),
        response=None if response is None else _text(file, line, "response", response, may_be_empty=True),
        response_ids=ids,
        prompt_ids=_token_ids(file, line, "prompt_ids", row.get("prompt_ids")),
    )


def _messages(file: Path, line: int, value: Any) -> tuple[dict[str, Any], ...]:
    fix = 'Give messages as [{"role": "user", "content": "…"}], the user\'s turn last.'
    if not isinstance(value, list) or not value:
        raise malformed_line(file, line, "messages is not a list of turns", fix=fix)
    messages = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise malformed_line(file, line, "a message has no role or no content", fix=fix)
        _text(file, line, "role", turn["role"])
        _text(file, line, "content", turn["content"], may_be_empty=True)
        messages.append({"role": turn["role"], "content": turn["content"]})
    if messages[-1]["role"] == "assistant":
        raise malformed_line(file, line, "the last message is the assistant's, so there is nothing to answer", fix=fix)
    return tuple(messages)


def _text(file: Path, line: int, name: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise malformed_line(file, line, f"{name} is not a text", fix=f"Give {name} as a JSON string.")
    if not value and not may_be_empty:
        raise _missing(file, line, name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise malformed_line(file, line, f"{name} holds half a surrogate pair", fix="Write valid Unicode.") from error
    return value


def _scalar_text(file: Path, line: int, name: str, value: Any) -> str:
    unusable = isinstance(value, float) and isnan(value)  # what pandas writes for "absent"
    if unusable or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise malformed_line(
            file, line, f"{name} is neither text nor a number", fix=f"Give {name} as a string or a number."
        )
    return _text(file, line, name, str(value), may_be_empty=True)


def _token_ids(file: Path, line: int, name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise malformed_line(file, line, f"{name} is not a list of token ids", fix=f"Give {name} as [1, 2, …].")
    return tuple(value)


def _missing(file: Path, line: int, name: str) -> DataError:
    needed = "`prompt` or `messages`" if name == "prompt" else f"`{name}`"
    return DataError(
        "missing_field",
        f"{file.name} line {line} has no {needed}, or it is empty.",
        value=f"{file}:{line}",
        fix=f"Give every row a non-empty {needed}.",
    )


def _not_empty(file: Path, rows: list[Any]) -> list[Any]:
    if rows:
        return rows
    raise DataError("empty_data", f"{file.name} holds no rows.", value=file, fix="Give a file with at least one row.")


def eval_overlap(texts: list[str], evaluation: Iterable[str]) -> dict[str, int]:
    """How many prompts also stand in the evaluation set, as they are and normalised."""
    held_out = set(evaluation)
    normal = {normalised(text) for text in held_out}
    return {
        "eval_overlap_exact": sum(text in held_out for text in texts),
        "eval_overlap_normalised": sum(normalised(text) in normal for text in texts),
    }


def normalised(text: str) -> str:
    """Letters, digits, symbols and arithmetic signs of a text, without case, white space and other punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_KEPT)


class _Kept(dict[int, int | None]):
    """Whether a character stays, decided once a character: a plan compares whole data sets."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        # - and * are punctuation to Unicode, but between digits they are what tells two sums apart
        kept = not character.isspace() and (character in "-*/%" or unicodedata.category(character)[0] not in "PZC")
        self[code] = code if kept else None
        return self[code]


_KEPT = _Kept()
