"""The turns of a conversation, from `role`/`content` or `from`/`value`, with what templates render kept."""

import json
from typing import Any

from opd_mcp.identity.data.chunks import BadRow
from opd_mcp.identity.data.rows import Turns

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
