"""What SFT learns of one row of text, of token ids or of a chat: a prompt and a target with one end of turn.

A chat gives one target for each assistant turn that is learnt: what stood before it as the template shows it to a
model that is to answer, and the turn as the template writes it. Templates that drop the thinking of earlier turns are
met as they are met when responses are drawn.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from opd_mcp.identity.chat.rendering import REFUSALS, Turn
from opd_mcp.identity.chat.tokenizer import END_THINK, THINK, ChatTokenizer
from opd_mcp.identity.data.rows import ResponseRow, answer_text
from opd_mcp.schemas.recipes import TrainTurns


@dataclass(frozen=True)
class Target:
    """The ids of a prompt and of what is learnt after it."""

    prompt: list[int]
    response: list[int]
    cut: bool = False
    """Whether something stood after the end of the turn."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class TargetWriter:
    """Writes the targets of one row after the other; `end` is the stop that ends a turn which is taught."""

    def __init__(self, chat: ChatTokenizer, stops: Collection[int], end: int, train_turns: TrainTurns = "all") -> None:
        self.chat, self.stops, self.end, self.train_turns = chat, frozenset(stops), end, train_turns

    def targets(self, row: ResponseRow) -> list[Target]:
        """One target for a response, one for each turn of a chat that is learnt; one of `REFUSALS` for some chats."""
        if row.response_ids is None and row.chat is not None and self.chat.template is not None:
            return self._chat_targets(row.chat, row.tools)
        prompt = list(row.prompt_ids) if row.prompt_ids else self.chat.prompt_ids(row.prompt)
        if row.response_ids is not None:
            return [self._ended(prompt, list(row.response_ids), ended=not row.truncated, own_end=True)]
        assert row.response is not None, "a response row has text or ids"
        text = row.response
        if self.chat.template is not None and row.prompt_ids is None and text.lstrip().startswith(THINK):
            text = _after_opened_thinking(self.chat.decode(prompt[-8:]), text)
        return [self._ended(prompt, self.chat.ids(text), ended=not row.truncated)]

    def _chat_targets(self, chat: Sequence[Turn], tools: Sequence[Turn] | None) -> list[Target]:
        answers = [index for index in range(1, len(chat)) if chat[index]["role"] == "assistant"]
        if self.train_turns == "last":
            answers = answers[-1:]
        found = []
        for index in answers:
            before, text = self._written(chat[: index + 1], tools)
            found.append(self._ended(self.chat.ids(before), self.chat.ids(text)))
        return found

    def _written(self, turns: Sequence[Turn], tools: Sequence[Turn] | None) -> tuple[str, str]:
        """What the template shows before the assistant's last turn, and what that turn adds."""
        earlier, names = _call_names(turns[:-1]), _call_names(turns[-1:])
        refusal: Exception = ValueError("the template leaves out the tool calls")
        for form in _forms(turns):
            try:
                before = self.chat.rendered(form[:-1], to_answer=True, tools=tools)
                whole = self.chat.rendered(form, to_answer=False, tools=tools)
            except REFUSALS as error:
                refusal = error
                continue
            if not all(name in before for name in earlier):
                continue
            if whole.startswith(before) and all(name in whole[len(before) :] for name in names):
                return before, whole[len(before) :]
            if not names:  # the template drops or moves the thinking: the turn follows its beginning as it is
                turn = form[-1]
                text = str(turn["content"]) if before.rstrip().endswith(END_THINK) else answer_text(dict(turn))
                return before, _after_opened_thinking(before, text)
        raise refusal

    def _ended(self, prompt: list[int], ids: list[int], *, ended: bool = True, own_end: bool = False) -> Target:
        """The target up to its first stop token, which becomes the end of the turn where `own_end` is not to be kept.

        A response that is not `ended` is not taught an end that it does not have.
        """
        stop = next((place for place, token_id in enumerate(ids) if token_id in self.stops), None)
        if stop is None:
            return Target(prompt, [*ids, self.end] if ended and ids else ids)
        end = ids[stop] if own_end else self.end
        rest = self.chat.decode(ids[stop + 1 :]) if stop + 1 < len(ids) else ""
        return Target(prompt, [*ids[:stop], end], cut=bool(rest.strip()))


def _after_opened_thinking(before: str, text: str) -> str:
    """The text without its opening `<think>` where the prompt's end has opened it."""
    if before.rstrip().endswith(THINK) and text.lstrip().startswith(THINK):
        return text.lstrip()[len(THINK) :].lstrip("\n")
    return text


def _call_names(turns: Sequence[Turn]) -> list[str]:
    return [str(_function(call).get("name", "")) for turn in turns for call in turn.get("tool_calls") or ()]


def _forms(turns: Sequence[Turn]) -> list[list[dict[str, Any]]]:
    """The turns in the forms that templates want tool calls in: arguments as an object, or as JSON text."""
    if not any(turn.get("tool_calls") for turn in turns):
        return [[dict(turn) for turn in turns]]
    return [[_with_calls(turn, as_text=as_text) for turn in turns] for as_text in (False, True)]


def _with_calls(turn: Turn, *, as_text: bool) -> dict[str, Any]:
    """A turn with its calls' arguments as text or as object."""
    if not turn.get("tool_calls"):
        return dict(turn)
    calls = []
    for call in turn["tool_calls"]:
        function = dict(_function(call))
        given = function.get("arguments")
        if as_text and not isinstance(given, str):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
        elif not as_text and isinstance(given, str):
            function["arguments"] = _parsed(given)
        calls.append({"type": "function", **call, "function": function} if "function" in call else function)
    return {**turn, "tool_calls": calls}


def _function(call: Any) -> Any:
    return call.get("function", call)


def _parsed(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
