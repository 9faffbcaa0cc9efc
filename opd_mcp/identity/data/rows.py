"""Prompts and responses as typed rows, and the hash of prompts by which artifacts are found."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Turns = tuple[dict[str, Any], ...]
PROMPT_COLUMNS = ("id", "prompt", "messages", "answer")
RESPONSE_COLUMNS = (*PROMPT_COLUMNS, "response", "response_ids", "prompt_ids", "finish_reason")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: exactly one of `prompt` and `messages` is set; `id` is the file's, or the row number from 0."""

    id: str
    prompt: str | None = None
    messages: Turns | None = None
    answer: str | None = None

    def text(self) -> str:
        """The prompt for showing to people: the text, or the last message's."""
        return self.prompt if self.prompt is not None else str((self.messages or ({},))[-1].get("content", ""))

    def whole_text(self) -> str:
        """All text that the prompt gives to the model: the text, or every message's, one per line."""
        if self.prompt is not None:
            return self.prompt
        return "\n".join(str(message.get("content", "")) for message in self.messages or ())


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

    def add(self, prompts: Sequence[tuple[str, str | None, Turns | None, str | None]]) -> None:
        """Take in prompts, each as (id, prompt, messages, answer)."""
        if prompts:
            text = self._encode(prompts)[1:-1]
            self._digest.update((f",{text}" if self._begun else text).encode())
            self._begun = True

    def hexdigest(self) -> str:
        """The hash of what was taken in so far."""
        digest = self._digest.copy()
        digest.update(b"]")
        return digest.hexdigest()


def prompts_hash(rows: Iterable[PromptRow]) -> str:
    """sha256 (hex) of prompts with their ids and answers, in order, whatever file they come from."""
    digest = PromptsHash()
    for row in rows:
        digest.add([(row.id, row.prompt, row.messages, row.answer)])
    return digest.hexdigest()
