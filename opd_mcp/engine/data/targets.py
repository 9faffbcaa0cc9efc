"""What SFT learns: from rows of text, of token ids or of chats to prompts with targets, each with one end of turn.

A chat gives one sequence for each assistant turn that is learnt: what stood before it as the template shows it to a
model that is to answer, and the turn as the template writes it. Templates that drop the thinking of earlier turns are
met as they are met when responses are drawn.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import prompt_ids
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.data.templates import REFUSALS, Turn, limited_rendering, rendered
from opd_mcp.engine.models.loading import AdoptedTokenizer
from opd_mcp.identity.data.rows import ResponseRow, answer_text
from opd_mcp.schemas.errors import DataError
from opd_mcp.schemas.recipes import SftRecipe
from opd_mcp.schemas.reports import SftRows

TRUNCATED_SHARE_TO_ALERT = 0.1
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class SftTargets:
    """The sequences to learn, and what became of the rows."""

    sequences: Sequences
    rows: SftRows


@dataclass(frozen=True)
class _Target:
    prompt: list[int]
    response: list[int]
    cut: bool = False
    """Whether something stood after the end of the turn."""


def sft_targets(
    rows: Sequence[ResponseRow], adopted: AdoptedTokenizer, section: SftRecipe, context: Context
) -> SftTargets:
    """Every row's targets that fit `section.max_length` tokens; what is left out is counted, and told in alerts.

    Raises DataError `unknown_token` for ids outside the vocabulary, `empty_data` if nothing is left; ArgumentError
    `too_slow` for a chat template that does not end.
    """
    _require_known_ids(rows, adopted)
    writer = _Writer(adopted, section, context)
    kept: list[_Target] = []
    counts: Counter[str] = Counter()
    with limited_rendering(len(rows)):
        for row in rows:
            if row.truncated and section.on_truncated == "drop":
                counts["truncated"] += 1
                continue
            try:
                targets = writer.targets(row)
            except REFUSALS as error:
                if isinstance(error, DataError) or row.chat is None:
                    raise
                counts["refused"] += 1
                continue
            usable = [target for target in targets if target.prompt and target.response]
            fitting = [target for target in usable if _length(target) <= section.max_length]
            counts["empty"] += not usable
            counts["too_long"] += len(usable) - len(fitting)
            counts["cut"] += sum(target.cut for target in fitting)
            kept += fitting
    found = SftRows(rows=len(rows), targets=len(kept), **counts)
    _report(found, section, context)
    return SftTargets(build_sequences([t.prompt for t in kept], [t.response for t in kept]), found)


def _length(target: _Target) -> int:
    return len(target.prompt) + len(target.response)


class _Writer:
    """Writes the targets of one row after the other."""

    def __init__(self, adopted: AdoptedTokenizer, section: SftRecipe, context: Context) -> None:
        self.adopted, self.section, self.context = adopted, section, context
        self.tokenizer = adopted.tokenizer
        self.stops = frozenset(adopted.eos_token_ids)

    def targets(self, row: ResponseRow) -> list[_Target]:
        """One target for a response, one for each turn of a chat that is learnt; one of `REFUSALS` for some chats."""
        if row.response_ids is None and row.chat is not None and self.tokenizer.chat_template is not None:
            return self._chat_targets(row.chat, row.tools)
        prompt = list(row.prompt_ids) if row.prompt_ids else prompt_ids(row.prompt, self.tokenizer, self.context)
        if row.response_ids is not None:
            return [self._ended(prompt, list(row.response_ids), ended=not row.truncated, own_end=True)]
        assert row.response is not None, "a response row has text or ids"
        text = row.response
        if self.tokenizer.chat_template is not None and row.prompt_ids is None and text.lstrip().startswith(THINK):
            text = _after_opened_thinking(self.tokenizer.decode(prompt[-8:]), text)
        return [self._ended(prompt, self._ids(text), ended=not row.truncated)]

    def _chat_targets(self, chat: Sequence[Turn], tools: Sequence[Turn] | None) -> list[_Target]:
        answers = [index for index in range(1, len(chat)) if chat[index]["role"] == "assistant"]
        if self.section.train_turns == "last":
            answers = answers[-1:]
        found = []
        for index in answers:
            before, text = self._written(chat[: index + 1], tools)
            found.append(self._ended(self._ids(before), self._ids(text)))
        return found

    def _written(self, turns: Sequence[Turn], tools: Sequence[Turn] | None) -> tuple[str, str]:
        """What the template shows before the assistant's last turn, and what that turn adds."""
        options = self.context.prompting.chat_template_kwargs
        if tools is not None:
            options = {**options, "tools": [dict(tool) for tool in tools]}
        earlier, names = _call_names(turns[:-1]), _call_names(turns[-1:])
        refusal: Exception = ValueError("the template leaves out the tool calls")
        for form in _forms(turns):
            try:
                before = rendered(self.tokenizer, form[:-1], options, to_answer=True)
                whole = rendered(self.tokenizer, form, options, to_answer=False)
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

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _ended(self, prompt: list[int], ids: list[int], *, ended: bool = True, own_end: bool = False) -> _Target:
        """The target up to its first stop token, which becomes the end of the turn where `own_end` is not to be kept.

        A response that is not `ended` is not taught an end that it does not have.
        """
        stop = next((place for place, token_id in enumerate(ids) if token_id in self.stops), None)
        if stop is None:
            return _Target(prompt, [*ids, self.adopted.end_of_turn] if ended and ids else ids)
        end = ids[stop] if own_end else self.adopted.end_of_turn
        rest = self.tokenizer.decode(ids[stop + 1 :]) if stop + 1 < len(ids) else ""
        return _Target(prompt, [*ids[:stop], end], cut=bool(rest.strip()))


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


def _require_known_ids(rows: Sequence[ResponseRow], adopted: AdoptedTokenizer) -> None:
    for row in rows:
        for name, ids in (("prompt_ids", row.prompt_ids), ("response_ids", row.response_ids)):
            largest = max(ids, default=0) if ids else 0
            if largest >= adopted.tokens:
                raise DataError(
                    "unknown_token",
                    f"{name} of row {row.prompt.id} holds the id {largest}, and the vocabulary ends at "
                    f"{adopted.tokens - 1}.",
                    value=largest,
                    fix="Give ids of the teacher's tokenizer, or leave the ids out and give text.",
                )


def _report(found: SftRows, section: SftRecipe, context: Context) -> None:
    """Alerts for what is left out; raises DataError `empty_data` if that is everything."""
    left_out = [
        (found.empty, "are empty"),
        (found.too_long, f"are over {section.max_length} tokens with their prompt"),
        (found.refused, "are chats that the template refuses"),
    ]
    reasons = [f"{count} {why}" for count, why in left_out if count]
    if reasons:
        context.reporter.alert("responses_dropped", f"Of {found.rows} rows these are left out: {', '.join(reasons)}.")
    share = found.truncated / found.rows if found.rows else 0.0
    truncated = f"{found.truncated} of {found.rows} responses ({share:.0%}) were cut by the length limit"
    if share > TRUNCATED_SHARE_TO_ALERT:
        context.reporter.alert(
            "responses_truncated",
            f"{truncated} and are left out; raise responses.sampling.max_new_tokens and generate them again.",
        )
    if not found.targets:
        reasons += [truncated] if found.truncated else []
        raise DataError(
            "empty_data",
            f"No response can be learnt: {', '.join(reasons) or 'there are no rows'}.",
            value=found.rows,
            fix="Raise 'sft.max_length', set 'sft.on_truncated' to 'keep', or give other responses.",
        )
