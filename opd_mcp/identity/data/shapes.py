"""The shapes that prompts and responses come in, and where each shape keeps its parts.

A path such as `reward_model.ground_truth` leads into nested fields; a part of it may be a position in a list.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import repeat
from math import isnan
from typing import Any, Literal

from opd_mcp.identity.data.rows import (
    BadRow,
    Chunk,
    PromptParts,
    PromptRow,
    ResponseRow,
    Row,
    Turns,
    answer_text,
    before_answer,
    is_turns,
    is_valid_text,
    missing,
    scalar_text,
    text_of,
    token_ids,
    tools_of,
    turns_of,
    turns_of_all,
    user_turn,
)
from opd_mcp.schemas.errors import ArgumentError, nearest

PROMPT_PARTS = ("id", "prompt", "messages", "system", "answer", "teacher_messages", "teacher_domain")
RESPONSE_PARTS = (*PROMPT_PARTS, "response", "response_ids", "prompt_ids", "tools", "finish_reason")
Gold = Literal["as it is", "after ####", "in \\boxed{}", "after ####, in \\boxed{}, or as it is"]


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
    teacher: str = "teacher_messages"
    """The turns that the teacher sees instead of the prompt."""
    domain: str = "teacher_domain"
    """The name of one of several teachers."""

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
        paths |= {"teacher_messages": self.teacher, "teacher_domain": self.domain}
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
        teacher=columns.get("teacher_messages", "teacher_messages"),
        domain=columns.get("teacher_domain", "teacher_domain"),
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
    plain = row_id, prompt, turns, _answer_of(shape, row, chat=turns is not None)
    seen = _teacher_turns(shape, row)
    own = user_turn(prompt) if prompt is not None else turns
    seen = None if seen == own else seen
    domain = value_at(row, shape.domain)
    name = None if domain is None else scalar_text(shape.domain, domain)
    return plain if seen is None and name is None else (*plain, seen, name)


def all_prompt_parts(shape: Shape, chunk: Chunk, index: int) -> list[PromptParts] | None:
    """`prompt_parts` of rows that all have the same fields, column by column, which takes a fraction of the time.

    None where a row needs a closer look: a value is missing, or is not simply a text, a whole number or plain turns.
    """
    names = dict.fromkeys(chunk.fields() or ())
    special = {_root(shape.teacher), _root(shape.domain), shape.system} & names.keys()
    if shape.context or special or ("prompt" in names and "messages" in names):
        return None
    ids: list[str] | None = list(map(str, range(index, index + len(chunk))))
    if _root(shape.id) in names:
        ids = _texts(chunk, shape.id, (str, int))
    prompts = _values(chunk, shape.key)
    if ids is None or prompts is None:
        return None
    if set(map(type, prompts)) == {list}:
        turns = turns_of_all(prompts, chunk.valid_text)
        prompts = turns and [before_answer(some) if some[-1]["role"] == "assistant" else some for some in turns]
        answers = _answers(shape, chunk, chat=True)
        return None if not prompts or answers is None else _parts(prompts, zip(ids, repeat(None), prompts, answers))
    if shape.turns is not None or set(map(type, prompts)) != {str}:
        return None
    if not (chunk.valid_text or is_valid_text(prompts)):
        return None
    answers = _answers(shape, chunk, chat=False)
    return None if answers is None else _parts(prompts, zip(ids, prompts, repeat(None), answers))


def _parts(prompts: Sequence[Any], parts: Iterable[PromptParts]) -> list[PromptParts] | None:
    return list(parts) if all(prompts) else None


def _answers(shape: Shape, chunk: Chunk, *, chat: bool) -> Sequence[str | None] | None:
    """`_answer_of` every row; None where a row needs a closer look."""
    names = chunk.fields() or ()
    found = next(
        (path for path in (shape.answer, shape.verifier if chat else None) if path and _root(path) in names), None
    )
    if found is not None:
        golds = _texts(chunk, found, (str, int))
        if golds is None or shape.gold == "as it is":
            return golds
        other = partial(_gold, shape) if "boxed" in shape.gold else str
        return [
            gold.rpartition("####")[2].strip() or _gold(shape, gold) if "####" in gold else other(gold)
            for gold in golds
        ]
    if shape.solution is None or _root(shape.solution) not in names:
        return [None] * len(chunk)
    solutions = _texts(chunk, shape.solution, (str,))
    if solutions is None or shape.turns != "messages":
        return solutions and [boxed(text) for text in solutions]
    chats = chunk.column("messages")
    return [boxed(text) if _ends_answered(turns) else None for text, turns in zip(solutions, chats, strict=True)]


def _texts(chunk: Chunk, path: str, kinds: tuple[type, ...]) -> list[str] | None:
    """The texts at a path, whole numbers turned into text; None where a value is of no such kind."""
    values = _values(chunk, path)
    found = set(map(type, values or ()))
    if values is None or not found <= set(kinds):
        return None
    texts = values if found == {str} else list(map(str, values))
    return texts if chunk.valid_text or is_valid_text(texts) else None


def _values(chunk: Chunk, path: str) -> list[Any] | None:
    """The values at a path that begins with one of a chunk's fields."""
    names = chunk.fields() or ()
    if path in names:
        return chunk.column(path)
    root = _root(path)
    return [value_at({root: value}, path) for value in chunk.column(root)] if root in names else None


def _root(path: str) -> str:
    return path.split(".", maxsplit=1)[0]


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


def _teacher_turns(shape: Shape, row: Row) -> Turns | None:
    value = value_at(row, shape.teacher)
    if value is None or value == []:
        return None
    turns = turns_of(value, shape.teacher)
    if turns[-1]["role"] == "assistant":
        raise BadRow(
            "malformed_line",
            f"{shape.teacher} ends with the assistant's turn, so there is nothing to answer",
            "Let the teacher's messages end with the user's turn.",
        )
    return turns


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
    return boxed(text_of(str(shape.solution), solution, may_be_empty=True))


def _gold(shape: Shape, text: str) -> str:
    """The answer in a text that may hold its derivation as well."""
    if shape.gold == "as it is":
        return text
    _, mark, after = text.rpartition("####")
    if mark and (after := after.strip()):
        return after
    return (boxed(text) or text) if "boxed" in shape.gold else text


def _ends_answered(turns: Any) -> bool:
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and last.get("role") == "assistant"
