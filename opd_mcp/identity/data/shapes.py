"""The shapes that prompts and responses come in, and where each shape keeps its parts.

A path such as `reward_model.ground_truth` leads into nested fields; a part of it may be a position in a list.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import repeat
from math import isnan
from typing import Any, Literal

from opd_mcp.identity.data.chunks import BadRow, Row
from opd_mcp.identity.data.rows import PromptRow, ResponseRow, Turns
from opd_mcp.identity.data.turns import answer_text, before_answer, is_turns, tools_of, turns_of
from opd_mcp.schemas.errors import ArgumentError, nearest

PROMPT_PARTS = ("id", "prompt", "messages", "system", "answer")
RESPONSE_PARTS = (*PROMPT_PARTS, "response", "response_ids", "prompt_ids", "tools", "finish_reason")
Gold = Literal["as it is", "after ####", "in \\boxed{}", "after ####, in \\boxed{}, or as it is"]
PromptParts = tuple[str, str | None, Turns | None, str | None]
"""(id, prompt, messages, answer) of a `PromptRow`."""


@dataclass(frozen=True)
class Shape:
    """Where a row keeps its parts: each is the path of a field, None where the shape has no such part."""

    name: str
    prompt: str | None = None
    turns: str | None = None
    context: str | None = None
    """A text that follows the prompt after an empty line, where it is not empty."""
    system: str | None = None
    answer: str | None = None
    gold: Gold = "as it is"
    solution: str | None = None
    """A worked solution whose `\\boxed{}` holds the answer where `answer` is missing."""
    verifier: str | None = None
    """The answer of a prompt that is given as turns, where `answer` is missing."""
    response: str | None = None
    response_ids: str | None = None
    prompt_ids: str | None = None
    finish_reason: str | None = None
    """`length` for a response that the length limit cut, as servers and teacher caches write it."""
    tools: str | None = None
    """Definitions of functions that the assistant of a chat may call, as a list of objects or as JSON text."""
    id: str = "id"

    @property
    def key(self) -> str:
        """The field that a row must have to be of this shape."""
        return str(self.prompt or self.turns)

    def columns(self) -> dict[str, str]:
        """The paths by part, as a caller would write them in `columns`."""
        paths = {"id": self.id, "prompt": self.prompt, "messages": self.turns, "context": self.context}
        paths |= {"system": self.system, "answer": self.answer, "solution": self.solution, "verifier": self.verifier}
        paths |= {"response": self.response, "response_ids": self.response_ids, "prompt_ids": self.prompt_ids}
        paths |= {"finish_reason": self.finish_reason, "tools": self.tools}
        return {part: path for part, path in paths.items() if path is not None}

    def renamed(self, names: Mapping[str, str]) -> "Shape":
        """The shape with its fields called as `names` says, e.g. {"problem": "Problem"}."""
        kept = ("name", "gold")
        paths = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in kept}
        return replace(self, **{name: names.get(path, path) for name, path in paths.items() if path is not None})


_CANONICAL = (
    Shape("prompt", prompt="prompt", answer="answer", verifier="reward_model.ground_truth"),
    Shape("messages", turns="messages", answer="answer", solution="solution"),
)
# The first whose key a row has. `prompt` and `messages` come first: they are this project's own.
PROMPT_SHAPES = (
    *_CANONICAL,
    Shape("conversations", turns="conversations", system="system", answer="answer", solution="solution"),
    Shape("conversation", turns="conversation", system="system", answer="answer", solution="solution"),
    Shape("question/final_answer", prompt="question", answer="final_answer"),
    Shape("question/answer", prompt="question", answer="answer", gold="after ####"),
    Shape("problem/solution", prompt="problem", answer="answer", solution="solution"),
    Shape("instruction/input/output", prompt="instruction", context="input"),
    Shape("query/response", prompt="query", answer="answer"),
    Shape("text", prompt="text"),
)
# The first whose key and response a row has.
RESPONSE_SHAPES = (
    *(
        replace(
            shape,
            response="response",
            response_ids="response_ids",
            prompt_ids="prompt_ids",
            finish_reason="finish_reason",
            tools="tools",
        )
        for shape in _CANONICAL
    ),
    Shape(
        "prompt/completion",
        prompt="prompt",
        answer="answer",
        response="completion",
        tools="tools",
        finish_reason="finish_reason",
    ),
    *(replace(shape, solution=None, tools="tools", finish_reason="finish_reason") for shape in PROMPT_SHAPES[1:4]),
    Shape("instruction/input/output", prompt="instruction", context="input", response="output"),
    Shape("query/response", prompt="query", answer="answer", response="response"),
    Shape("question/response", prompt="question", answer="answer", response="response"),
    Shape("question/r1_solution_1", prompt="question", answer="final_answer", response="r1_solution_1"),
    Shape("question/answer", prompt="question", answer="answer", gold="after ####", response="answer"),
    Shape("problem/solution", prompt="problem", answer="answer", solution="solution", response="solution"),
)


def has_required(shape: Shape, has: Callable[[str], bool]) -> bool:
    """Whether fields make a row of this shape; `has` says whether a path leads to one."""
    if not has(shape.key):
        return False
    if shape.name == "question/final_answer":  # else it is the next shape
        return has(str(shape.answer))
    if shape.response is None:
        return True
    return has(shape.response) or (shape.response_ids is not None and has(shape.response_ids))


def shape_of(row: Row, shapes: Sequence[Shape]) -> Shape | None:
    """The shape of a row without missing values; names that differ in case alone are found too."""
    found = _first_fitting(row, shapes)
    if found is not None or all(name == name.lower() for name in row):
        return found
    found = _first_fitting({name.lower(): value for name, value in row.items()}, shapes)
    names = {name.lower(): name for name in row}
    return None if found is None else found.renamed(names)


def _first_fitting(row: Row, shapes: Sequence[Shape]) -> Shape | None:
    return next((shape for shape in shapes if has_required(shape, lambda path: value_at(row, path) is not None)), None)


def shape_of_columns(columns: Mapping[str, str], shapes: Sequence[Shape]) -> Shape:
    """The shape that a caller's `columns` describe; raises ArgumentError `invalid_argument`."""
    responses = shapes is RESPONSE_SHAPES
    parts = RESPONSE_PARTS if responses else PROMPT_PARTS
    for part in columns:
        if part not in parts:
            raise ArgumentError(
                "invalid_argument",
                f"columns has no part {part[:100]!r}.",
                value=part,
                nearest=nearest(part, parts),
                fix=f"Use only: {', '.join(parts)}.",
            )
    if ("prompt" in columns) == ("messages" in columns):
        raise ArgumentError(
            "invalid_argument",
            "columns must name the field of exactly one of prompt and messages.",
            value=dict(columns),
            fix='Give e.g. columns={"prompt": "question", "answer": "answer"}.',
        )
    return Shape(
        "columns",
        prompt=columns.get("prompt"),
        turns=columns.get("messages"),
        system=columns.get("system"),
        answer=columns.get("answer"),
        gold="after ####, in \\boxed{}, or as it is",
        response=columns.get("response"),
        response_ids=columns.get("response_ids"),
        prompt_ids=columns.get("prompt_ids"),
        tools=columns.get("tools", "tools") if responses else None,
        finish_reason=columns.get("finish_reason", "finish_reason") if responses else None,
        id=columns.get("id", "id"),
    )


def value_at(row: Row, path: str) -> Any:
    """The value that a path leads to; None where it is missing, or NaN, which pandas writes for missing."""
    value = row.get(path)
    if value is None and "." in path:
        value = row
        for part in path.split("."):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
    return None if isinstance(value, float) and isnan(value) else value


def prompt_parts(shape: Shape, row: Row, index: int) -> PromptParts:
    """The parts of one prompt; raises BadRow."""
    identity = value_at(row, shape.id)
    row_id = str(index) if identity is None else scalar_text(shape.id, identity)
    prompt, turns = _prompt_of(shape, row)
    return row_id, prompt, turns, _answer_of(shape, row, chat=turns is not None)


def all_prompt_parts(shape: Shape, rows: Sequence[Row], index: int) -> list[PromptParts] | None:
    """`prompt_parts` of rows that all have the same fields, column by column, which takes a fraction of the time.

    None where a row needs a closer look: a value is missing, or is not simply a text or a whole number.
    """
    names = rows[0]
    if shape.prompt is None or shape.context or shape.system or ("prompt" in names and "messages" in names):
        return None
    prompts = _column(rows, shape.prompt, (str,))
    ids: list[str] | None = list(map(str, range(index, index + len(rows))))
    if value_at(names, shape.id) is not None:
        ids = _column(rows, shape.id, (str, int))
    if prompts is None or ids is None or not all(prompts):
        return None
    answers: list[str | None] = [None] * len(rows)
    if shape.answer is not None and value_at(names, shape.answer) is not None:
        golds = _column(rows, shape.answer, (str, int))
        if golds is None:
            return None
        answers = [*golds] if shape.gold == "as it is" else [_gold(shape, gold) for gold in golds]
    elif shape.answer is not None and "." in shape.answer:
        return None
    elif shape.solution is not None and shape.solution in names:
        solutions = _column(rows, shape.solution, (str,))
        if solutions is None:
            return None
        answers = [boxed(solution) for solution in solutions]
    return list(zip(ids, prompts, repeat(None), answers, strict=False))


def _column(rows: Sequence[Row], path: str, kinds: tuple[type, ...]) -> list[str] | None:
    """The texts at a path, whole numbers turned into text; None where a value is of no such kind."""
    values: list[Any] = [row[path] for row in rows] if path in rows[0] else [value_at(row, path) for row in rows]
    found = set(map(type, values))
    if not found <= set(kinds):
        return None
    texts = values if found == {str} else list(map(str, values))
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    return texts


def prompt_row(shape: Shape, row: Row, index: int) -> PromptRow:
    """One prompt; raises BadRow."""
    return PromptRow(*prompt_parts(shape, row, index))


def response_row(shape: Shape, row: Row, index: int) -> ResponseRow:
    """One prompt with its response; raises BadRow."""
    response = None if shape.response is None else value_at(row, shape.response)
    ids = None if shape.response_ids is None else token_ids(shape.response_ids, value_at(row, shape.response_ids))
    prompt_ids = None if shape.prompt_ids is None else token_ids(shape.prompt_ids, value_at(row, shape.prompt_ids))
    if shape.response is None and ids is None:
        return _chat_row(shape, row, index, _turns_at(shape, row))
    if is_turns(response):
        assert shape.response is not None
        return _chat_row(shape, row, index, _turns_before(shape, row) + turns_of(response, shape.response))
    if response is None and ids is None:
        raise missing(shape.response or "response")
    prompt = prompt_row(shape, row, index)
    if prompt.messages and _ends_answered(value_at(row, shape.key)):
        raise BadRow(
            "malformed_line",
            f"{shape.key} ends with the assistant's turn, and there is a response as well",
            "Keep one of the two.",
        )
    return ResponseRow(
        prompt=prompt,
        response=None if response is None else text_of(str(shape.response), response, may_be_empty=True),
        response_ids=ids,
        prompt_ids=prompt_ids,
        truncated=_is_truncated(shape, row),
    )


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


def token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """Token ids, whole numbers from 0; raises BadRow."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise BadRow("malformed_line", f"{name} is not a list of token ids", f"Give {name} as [1, 2, …].")
    return tuple(value)


def boxed(text: str) -> str | None:
    """What the last `\\boxed{}` of a solution holds; None without one."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = end = text.index("{", start) + 1
    depth = 1
    while end < len(text) and depth:
        depth += (text[end] == "{") - (text[end] == "}")
        end += 1
    return text[begin : end - 1].strip() or None if depth == 0 else None


def _prompt_of(shape: Shape, row: Row) -> tuple[str | None, Turns | None]:
    """The text of a prompt, or its turns up to the answer, which belong to no prompt."""
    value = None if shape.prompt is None else value_at(row, shape.prompt)
    if shape.name in ("prompt", "messages") and "prompt" in row and "messages" in row:
        raise BadRow(
            "malformed_line",
            "both prompt and messages are set",
            'Keep one of the two fields, or say which one: columns={"prompt": "prompt"}.',
        )
    if value is None and shape.turns is None:
        raise missing("prompt")
    if shape.turns is not None or is_turns(value):
        turns = before_answer(_turns_at(shape, row))
        if not turns:
            raise BadRow(
                "malformed_line",
                "all messages are the assistant's, so there is nothing to answer",
                'Give messages as [{"role": "user", "content": "…"}], the user\'s turn last.',
            )
        return None, turns
    text = text_of(str(shape.prompt), value)
    context = None if shape.context is None else value_at(row, shape.context)
    if context:
        text = f"{text}\n\n{text_of(str(shape.context), context)}"
    system = _system_of(shape, row)
    return (None, (*system, {"role": "user", "content": text})) if system else (text, None)


def _turns_at(shape: Shape, row: Row) -> Turns:
    name = str(shape.turns or shape.prompt)
    value = value_at(row, name)
    if value is None:
        raise missing("prompt" if name in ("prompt", "messages") else name)
    turns = turns_of(value, name)
    system = _system_of(shape, row)
    return turns if turns[0]["role"] == "system" else system + turns


def _turns_before(shape: Shape, row: Row) -> Turns:
    """The prompt as turns, for a completion that is given as turns."""
    prompt, turns = _prompt_of(shape, row)
    return turns if turns is not None else ({"role": "user", "content": prompt},)


def _system_of(shape: Shape, row: Row) -> Turns:
    value = None if shape.system is None else value_at(row, shape.system)
    return ({"role": "system", "content": text_of(str(shape.system), value)},) if value else ()


def _chat_row(shape: Shape, row: Row, index: int, turns: Turns) -> ResponseRow:
    fix = "Give chats that end with the assistant's turn, or a response."
    if turns[-1]["role"] != "assistant":
        raise BadRow("missing_field", "no `response`, and the chat does not end with the assistant's turn", fix)
    prompt = before_answer(turns)
    if not prompt:
        raise BadRow("malformed_line", "all messages are the assistant's, so there is nothing to answer", fix)
    row_id = value_at(row, shape.id)
    return ResponseRow(
        prompt=PromptRow(
            id=str(index) if row_id is None else scalar_text(shape.id, row_id),
            messages=prompt,
            answer=_answer_of(shape, row, chat=True),
        ),
        response=answer_text(turns[-1]),
        chat=turns,
        truncated=_is_truncated(shape, row),
        tools=None if shape.tools is None else tools_of(value_at(row, shape.tools), shape.tools),
    )


def _is_truncated(shape: Shape, row: Row) -> bool:
    return shape.finish_reason is not None and value_at(row, shape.finish_reason) == "length"


def _answer_of(shape: Shape, row: Row, *, chat: bool) -> str | None:
    value = None if shape.answer is None else value_at(row, shape.answer)
    if value is None and chat and shape.verifier is not None:
        value = value_at(row, shape.verifier)
    if value is not None:
        return _gold(shape, scalar_text(str(shape.answer), value))
    solution = None if shape.solution is None else value_at(row, shape.solution)
    # `messages` that end with the user's turn were read without a solution, and their hash must stay what it was.
    if not isinstance(solution, str) or (shape.turns == "messages" and not _ends_answered(row[shape.turns])):
        return None
    return boxed(text_of(str(shape.solution), solution))


def _gold(shape: Shape, text: str) -> str:
    """The answer in a text that may hold its derivation as well."""
    if shape.gold == "as it is":
        return text
    _, mark, after = text.rpartition("####")
    if mark and after.strip():
        return after.strip()
    return (boxed(text) or text) if "boxed" in shape.gold else text


def _ends_answered(turns: Any) -> bool:
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get("role") == "assistant"


# What fields that hold a prompt, an answer or a response are called, likeliest first.
_NAMES = {
    "prompt": ("prompt", "question", "problem", "query", "instruction", "input", "task", "user", "text"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "turns"),
    "answer": ("answer", "final_answer", "ground_truth", "gold", "target", "label", "solution", "expected"),
    "response": ("response", "completion", "output", "reply", "generation", "assistant", "target", "solution"),
}


def nearest_columns(fields: Mapping[str, Any], *, responses: bool) -> dict[str, str]:
    """The likeliest `columns` for a file, from its fields (paths) with one value of each; may be empty."""
    chats = [path for path, value in fields.items() if is_turns(value)]
    texts = [path for path, value in fields.items() if isinstance(value, str | int | float) and value != ""]
    guess: dict[str, str] = {}
    for part in ("prompt", "response" if responses else "answer"):
        close = _closest(_NAMES[part], [path for path in texts if path not in guess.values()])
        if close is not None:
            guess[part] = close
    if "prompt" not in guess and chats:
        return {"messages": _closest(_NAMES["messages"], chats) or chats[0], **guess}
    if "prompt" not in guess and texts:
        guess["prompt"] = max(texts, key=lambda path: len(str(fields[path])))
    return (
        {part: guess[part] for part in ("prompt", "response", "answer") if part in guess} if "prompt" in guess else {}
    )


def paths_in(row: Row) -> dict[str, Any]:
    """A row's fields with their values, those of nested objects by dotted path."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found[name] = value
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": part for inner, part in value.items()}
    return found


def _closest(names: Iterable[str], paths: Sequence[str]) -> str | None:
    best, score = None, 0.74
    for path in paths:
        last = path.rsplit(".", 1)[-1].lower()
        for name in names:
            ratio = SequenceMatcher(None, last, name).ratio()
            if ratio > score:
                best, score = path, ratio
    return best
