"""Rows as files hold them and as typed prompts and responses, and the hash by which prompts are found again."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from opd_mcp.schemas.errors import DataError

Row = dict[str, Any]
Turns = tuple[dict[str, Any], ...]
PlainParts = tuple[str, str | None, Turns | None, str | None]
"""(id, prompt, messages, answer) of a `PromptRow` that the teacher sees as the student does."""
PromptParts = PlainParts | tuple[str, str | None, Turns | None, str | None, Turns | None, str | None]
"""The same, and where a row has one of them the teacher's own turns and the teacher's domain."""
PLAIN_PARTS = 4
PROMPT_COLUMNS = ("id", "prompt", "messages", "answer", "teacher_messages", "teacher_domain")
RESPONSE_COLUMNS = (*PROMPT_COLUMNS, "response", "response_ids", "prompt_ids", "finish_reason")
# ShareGPT's names for the roles that templates know.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# What chat templates read of a turn besides its role and content.
KEPT = ("name", "reasoning_content", "thinking", "tool_calls", "tool_call_id")
TEXT_PARTS = ("text", "input_text", "output_text")
_FIX = 'Give messages as [{"role": "user", "content": "…"}], the user\'s turn last.'


class BadRow(ValueError):
    """A row that cannot be used: `code` as in the error tree, `why` in a few words, `fix` one next step."""

    def __init__(self, code: str, why: str, fix: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
        self.fix = fix


class Chunk:
    """Rows of one file, each with its line (of text) or its number (of a table), from 1.

    They are given as rows, or by column where every row has every column. `valid_text` says that no text in them can
    hold half a surrogate pair.
    """

    def __init__(
        self,
        file: Path,
        lines: Sequence[int],
        rows: Sequence[Row | BadRow] | None = None,
        columns: dict[str, list[Any]] | None = None,
        *,
        valid_text: bool = False,
    ) -> None:
        self.file = file
        self.lines = lines
        self.valid_text = valid_text
        self._rows = rows
        self._columns = columns
        self._fields: tuple[str, ...] | None = tuple(columns) if columns is not None else None
        self._looked_at = columns is not None

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def rows(self) -> Sequence[Row | BadRow]:
        """The rows one by one."""
        if self._rows is None:
            assert self._columns is not None
            names = tuple(self._columns)
            self._rows = [dict(zip(names, row, strict=True)) for row in zip(*self._columns.values(), strict=True)]
        return self._rows

    def fields(self) -> tuple[str, ...] | None:
        """The names that all rows have, in the same order; None where rows differ or cannot be read."""
        if not self._looked_at:
            self._looked_at = True
            found = set(map(tuple, self._rows or ())) if set(map(type, self._rows or ())) == {dict} else set()  # type: ignore[arg-type]
            self._fields = found.pop() if len(found) == 1 else None
        return self._fields

    def column(self, name: str) -> list[Any]:
        """The values of one of the `fields`."""
        return self._columns[name] if self._columns is not None else [row[name] for row in self._rows or ()]  # type: ignore[index]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: exactly one of `prompt` and `messages` is set; `id` is the file's, or the row number from 0.

    `teacher_messages` are what the teacher sees instead, None where it sees what the student sees; `teacher_domain`
    says which of several teachers it is.
    """

    id: str
    prompt: str | None = None
    messages: Turns | None = None
    answer: str | None = None
    teacher_messages: Turns | None = None
    teacher_domain: str | None = None

    def parts(self) -> PromptParts:
        """The row as `PromptParts`."""
        plain = self.id, self.prompt, self.messages, self.answer
        own = self.teacher_messages, self.teacher_domain
        return plain if own == (None, None) else (*plain, *own)

    def turns(self) -> Turns:
        """The prompt as turns."""
        return user_turn(self.prompt) if self.prompt is not None else self.messages or ()

    def for_teacher(self, system: str | None) -> "PromptRow":
        """The prompt as the teacher sees it: its own turns, or the student's, after the system prompt for it alone.

        A system turn that is there already follows that prompt, after an empty line.
        """
        turns = self.teacher_messages or self.turns()
        if system is None:
            return self if self.teacher_messages is None else replace(self, prompt=None, messages=turns)
        first, rest = ({}, turns) if turns[0]["role"] != "system" else (turns[0], turns[1:])
        content = f"{system}\n\n{first['content']}" if first.get("content") else system
        return replace(self, prompt=None, messages=({"role": "system", "content": content}, *rest))

    def text(self) -> str:
        """The prompt for showing to people: the text, or the last message's."""
        return shown_text(self.prompt, self.messages)

    def whole_text(self) -> str:
        """All text that the prompt gives to the model: the text, or every message's, one per line."""
        return whole_text(self.prompt, self.messages)


def user_turn(prompt: str) -> Turns:
    """A text as the turn that templates get for it."""
    return ({"role": "user", "content": prompt},)


def shown_text(prompt: str | None, messages: Turns | None) -> str:
    """`PromptRow.text` of a prompt in parts."""
    return prompt if prompt is not None else str((messages or ({},))[-1].get("content", ""))


def shown_texts(prompts: Sequence[str | None], messages: Sequence[Turns | None]) -> list[str]:
    """`shown_text` of many prompts, at a fraction of the time."""
    if all(messages):
        return [turns[-1]["content"] for turns in messages]  # type: ignore[index]
    return list(map(shown_text, prompts, messages))


def whole_text(prompt: str | None, messages: Turns | None) -> str:
    """`PromptRow.whole_text` of a prompt in parts."""
    return prompt if prompt is not None else "\n".join(str(turn.get("content", "")) for turn in messages or ())


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A prompt with the response to learn: text, token ids, or both.

    `chat` is the whole conversation where the file holds one, the assistant's last turn at its end, with its
    `reasoning_content` and `tool_calls`; `response` is then that turn's text, its reasoning in `<think>` tags; `tools`
    are the definitions of the functions that its assistant may call. `truncated` says that the length limit cut the
    response (`finish_reason` is "length").
    """

    prompt: PromptRow
    response: str | None = None
    response_ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    chat: Turns | None = None
    truncated: bool = False
    tools: Turns | None = None


class PromptsHash:
    """sha256 of prompts with their ids and answers, in order, taken in a batch at a time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"[")
        self._begun = False
        # As `content_hash` writes them, so that the hash is that of the whole list.
        self._encode = json.JSONEncoder(
            sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
        ).encode

    def add(self, prompts: Sequence[PromptParts]) -> None:
        """Take in prompts, each as (id, prompt, messages, answer)."""
        if prompts:
            text = self._quick_json(prompts) or self._encode(prompts).encode()
            self._digest.update(b"," + text[1:-1] if self._begun else text[1:-1])
            self._begun = True

    @staticmethod
    def _quick_json(prompts: Sequence[PromptParts]) -> bytes | None:
        """The same bytes from a faster encoder, which neither sorts keys nor writes floats as Python does."""
        if max(map(len, prompts)) > PLAIN_PARTS:
            return None
        messages = list(map(itemgetter(2), prompts))
        if messages.count(None) < len(prompts):
            turns = list(chain.from_iterable(filter(None, messages)))
            if set(map(len, turns)) != {2}:
                return None  # more than a role and a content, which every turn has
            pairs = zip(map(itemgetter("content"), turns), map(itemgetter("role"), turns), strict=True)
            sorted_turns = [{"content": content, "role": role} for content, role in pairs]
            ids, texts, _, answers = zip(*prompts, strict=True)  # each has four parts
            return to_json(list(zip(ids, texts, _regrouped(sorted_turns, messages), answers, strict=True)))
        return to_json(prompts)

    def hexdigest(self) -> str:
        """The hash of what was taken in so far."""
        digest = self._digest.copy()
        digest.update(b"]")
        return digest.hexdigest()


def prompts_hash(rows: Iterable[PromptRow]) -> str:
    """sha256 (hex) of prompts with their ids and answers, in order, whatever file they come from."""
    digest = PromptsHash()
    for row in rows:
        digest.add([row.parts()])
    return digest.hexdigest()


def require_all_or_no_domain(rows: Sequence[PromptRow]) -> None:
    """Raise DataError `unknown_domain` where only some prompts have a teacher's domain."""
    without = sum(row.teacher_domain is None for row in rows)
    if 0 < without < len(rows):
        raise DataError(
            "unknown_domain",
            f"{without} of {len(rows)} prompts have no `teacher_domain`, and the others have one.",
            value=without,
            fix="Give all prompts a `teacher_domain`, or none.",
        )


class TeacherTurnsHash:
    """sha256 of what the teacher alone sees of prompts, with their ids and in order; None where it sees no more."""

    def __init__(self) -> None:
        self._digest, self._any = PromptsHash(), False

    def add(self, prompts: Iterable[PromptParts]) -> None:
        """Take in prompts."""
        own: list[PromptParts] = [(parts[0], None, parts[4], None) for parts in prompts if len(parts) == 6]
        own = [parts for parts in own if parts[2] is not None]
        self._any = self._any or bool(own)
        self._digest.add(own)

    def hexdigest(self) -> str | None:
        """The hash of what was taken in so far."""
        return self._digest.hexdigest() if self._any else None


def missing(name: str) -> BadRow:
    """The error for a row without a part."""
    needed = "`prompt` or `messages`" if name == "prompt" else f"`{name}`"
    return BadRow("missing_field", f"no {needed}, or it is empty", f"Give every row a non-empty {needed}.")


def text_of(name: str, value: Any, *, may_be_empty: bool = False) -> str:
    """The text in the field `name`; raises BadRow."""
    if not isinstance(value, str):
        raise BadRow("malformed_line", f"{name} is not a text", f"Give {name} as a JSON string.")
    if not value and not may_be_empty:
        raise missing(name)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("malformed_line", f"{name} holds half a surrogate pair", "Write valid Unicode.") from None
    return value


def scalar_text(name: str, value: Any) -> str:
    """A text or number as text, a whole number without a fraction: `8` for 8.0; raises BadRow."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("malformed_line", f"{name} is neither text nor a number", f"Give {name} as a string or a number.")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return text_of(name, str(value), may_be_empty=True)


@dataclass
class RawIds:
    """Extremes of the rows that hold token ids: the largest id, and how long the shortest and longest rows are."""

    largest: int = -1
    largest_at: str = ""
    longest: int = 0
    longest_at: str = ""
    shortest: int | None = None

    def add(self, at: str, largest: int, length: int) -> None:
        """Take in a row, `at` a place for people."""
        if largest > self.largest:
            self.largest, self.largest_at = largest, at
        if length > self.longest:
            self.longest, self.longest_at = length, at
        self.shortest = length if self.shortest is None else min(self.shortest, length)


def token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """Token ids, whole numbers from 0; raises BadRow."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise BadRow("malformed_line", f"{name} is not a list of token ids", f"Give {name} as [1, 2, …].")
    return tuple(value)


def is_valid_text(texts: Iterable[str]) -> bool:
    """Whether no text holds half a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def turns_of(value: Any, name: str) -> Turns:
    """The turns in the field `name`; raises BadRow for what is no conversation."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # tables without nested columns hold it as JSON text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not value:
        raise BadRow("malformed_line", f"{name} is not a list of turns", _FIX)
    return tuple(_turn(turn) for turn in value)


def turns_of_all(values: Sequence[Any], valid_text: bool) -> list[Turns] | None:
    """`turns_of` of each value, at a fraction of the time; None where a turn is more than a speaker and a text."""
    turns = list(chain.from_iterable(values)) if set(map(type, values)) == {list} and all(values) else []
    if set(map(type, turns)) != {dict} or set(map(len, turns)) != {2}:
        return None
    speaker, content = ("role", "content") if "role" in turns[0] else ("from", "value")
    try:
        speakers = list(map(itemgetter(speaker), turns))
        contents = list(map(itemgetter(content), turns))
    except KeyError:
        return None
    if set(map(type, speakers)) | set(map(type, contents)) != {str} or not all(speakers):
        return None
    if not (valid_text or (is_valid_text(speakers) and is_valid_text(contents))):
        return None
    if speaker == "role":
        return list(map(tuple, values))
    roles = {name: ROLES.get(name.lower(), name) for name in set(speakers)}
    made = [{"role": roles[name], "content": text} for name, text in zip(speakers, contents, strict=True)]
    return [turns or () for turns in _regrouped(made, values)]


def _regrouped(items: list[dict[str, Any]], groups: Sequence[Sequence[Any] | None]) -> list[Turns | None]:
    """The items of all groups as one tuple per group, as long as the group is; None for None."""
    lengths = {-1 if group is None else len(group) for group in groups}
    left = iter(items)
    if len(lengths) == 1 and (length := lengths.pop()) > 0:
        return list(zip(*[left] * length, strict=True))
    return [None if group is None else tuple(islice(left, len(group))) for group in groups]


def tools_of(value: Any, name: str) -> Turns | None:
    """The definitions of functions in the field `name`, a list of objects or its JSON text; raises BadRow."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = 0
    if value is None or value == []:
        return None
    if not is_turns(value) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("malformed_line", f"{name} is not a list of objects", "Give tools as JSON schemas of functions.")
    return tuple(value)


def is_turns(value: Any) -> bool:
    """Whether a value is a list of objects, as turns are."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def before_answer(turns: Turns) -> Turns:
    """The turns that the assistant's last answer answers: those before the assistant's turns at the end."""
    end = len(turns)
    while end and turns[end - 1]["role"] == "assistant":
        end -= 1
    return turns[:end]


def answer_text(turn: dict[str, Any]) -> str:
    """An assistant's turn as text, for a tokenizer without a template: its reasoning in `<think>` tags first."""
    reasoning = turn.get("reasoning_content") or turn.get("thinking")
    return f"<think>\n{reasoning}\n</think>\n\n{turn['content']}" if reasoning else str(turn["content"])


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow("malformed_line", "a message has no role or no content", _FIX)
    role, content = turn.get("role"), turn.get("content", turn.get("value"))
    if role is None and isinstance(speaker := turn.get("from"), str):
        role = ROLES.get(speaker.lower(), speaker)
    kept = {name: turn[name] for name in KEPT if turn.get(name)} if len(turn) > 2 else {}
    if role != "tool":
        kept.pop("name", None)
    if content is None and (kept.get("tool_calls") or kept.get("reasoning_content")):
        content = ""
    if not isinstance(role, str) or content is None:
        raise BadRow("malformed_line", "a message has no role or no content", _FIX)
    if not role:
        raise BadRow("missing_field", "no `role`, or it is empty", _FIX)
    turned = {"role": role, "content": _content(content), **kept}
    try:
        (turned["role"] + turned["content"]).encode()
        if kept:
            json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRow("malformed_line", "a message holds half a surrogate pair", "Write valid Unicode.") from None
    except (TypeError, ValueError):
        raise BadRow("malformed_line", "a message holds what JSON cannot write", _FIX) from None
    return turned


def _content(content: Any) -> str:
    """The text of a turn; its text parts are joined by line breaks, and other parts are refused."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") not in TEXT_PARTS:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise BadRow("malformed_line", f"content holds a part of type {str(kind)[:40]}", "Give text only.")
        content = "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if not isinstance(content, str):
        raise BadRow("malformed_line", "content is not a text", "Give content as a JSON string.")
    return content
