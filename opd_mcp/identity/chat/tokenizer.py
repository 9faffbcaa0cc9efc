"""A tokenizer with its chat template: prompts to ids, the ids that end a response, control tokens as text or as tokens.

A control token that a user's text spells (`<|im_end|>` in a question) is text by default, so that no prompt can end its
turn and speak for another role. Control tokens are the tokenizer's special tokens, and those added tokens that the
template writes around turns; `<think>` and `</think>` are none, since prompts explain them and answers hold them.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer

from opd_mcp.identity.chat.rendering import FAILURES, NO_MOMENT, Turn, render
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.encoding import require_own_tokenizer, special_tokens
from opd_mcp.identity.tokenizers import TOKENIZER_FILE, chat_template, eos_token_ids
from opd_mcp.schemas.errors import ArgumentError, DataError, IntegrityError, PathError
from opd_mcp.schemas.recipes import PromptingRecipe

QUESTION, ANSWER = "QUESTION", "ANSWER"
THINK, END_THINK = "<think>", "</think>"
# Characters that stand in no text (Unicode's noncharacters) around the number of a control token: one that a user's
# text spells, and one that the template writes.
SPELT, WRITTEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"


class ChatTokenizer:
    """Encodes prompts as one recipe's `prompting` says; `names` are the special tokens that a template sees.

    `moment` is what the template's clock shows.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str | None,
        names: Mapping[str, str],
        prompting: PromptingRecipe,
        moment: datetime = NO_MOMENT,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.template, self.names, self.prompting = backend, template, names, prompting
        self.moment = moment
        # Nobody who wrote a text knew this number, so no text holds a mark.
        self._nonce = str(secrets.randbelow(10**12) + 10**12)

    def rendered(self, turns: Sequence[Turn], *, to_answer: bool, tools: Sequence[Turn] | None = None) -> str:
        """The turns as the template writes them, control tokens that users' texts spell as marks, which `ids` knows.

        Raises as `rendering.render`.
        """
        assert self.template is not None, "a tokenizer with a template"
        if self.writes_spelt_as_text:
            turns = [turn if turn.get("role") == "assistant" else self._marked(turn) for turn in turns]
            tools = None if tools is None else self._marked(tools)
        variables = {**self.names, **self.prompting.chat_template_kwargs}
        return render(self.template, turns, variables, to_answer=to_answer, moment=self.moment, tools=tools)

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, or of plain text that begins no sequence.

        Raises DataError `unknown_token` for a spelt control token that this tokenizer cannot write as text.
        """
        if self._mark_start not in text:
            return self.encoded(text, framed=False)
        written = self._control.sub(lambda found: self._mark(WRITTEN, found[0]), text)
        return self._ids_of_marked(self._unmarked(written))

    def encoded(self, text: str, *, framed: bool = True) -> list[int]:
        """The tokenizer's own ids of a text, `framed` by what it puts around one.

        Raises IntegrityError `damaged_file` where the tokenizer fails, as one without its token for unknown text does.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=framed).ids)
        except Exception as error:  # tokenizers raises nothing more precise
            raise IntegrityError(
                "damaged_file",
                f"{TOKENIZER_FILE} cannot encode a text ({error}).",
                fix="Save the tokenizer again with tokenizer.save_pretrained(DIR).",
            ) from error

    def plain(self, text: str) -> str:
        """A rendered text with its marks as the control tokens that they stand for."""
        return self._unmarked(text) if self._mark_start in text else text

    def prompt_text(self, row: PromptRow) -> str:
        """A prompt as the template shows it to a model that is to answer; its contents where there is no template.

        Raises DataError `too_large` for a template that writes without end, `template_failed` for one that fails.
        """
        messages = [{"role": "user", "content": row.prompt}] if row.messages is None else list(row.messages)
        if self.template is None:
            return "\n".join(str(message["content"]) for message in messages)
        try:
            return self.rendered(messages, to_answer=True)
        except FAILURES as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                "template_failed",
                f"The model's chat template fails on prompt {row.id} ({type(error).__name__}: {error}).",
                fix="Look at the model's chat_template.jinja and at the prompt's roles, or give another model.",
            ) from error

    def prompt_ids(self, row: PromptRow) -> list[int]:
        """Token ids of a prompt; raises as `prompt_text` and `ids`."""
        text = self.prompt_text(row)
        if self.template is not None:
            return self.ids(text)
        if not self.writes_spelt_as_text or not self._control.search(text):
            return self.encoded(text)
        before, after = self._frame
        return [*before, *self._ids_of_marked(text), *after]

    def spelt_control_tokens(self, row: PromptRow) -> Counter[str]:
        """The control tokens that a prompt's texts spell, an assistant's turns left out, each with how often."""
        contents = [row.prompt] if row.prompt is not None else _texts_of(row.messages or ())
        return Counter(found for text in contents for found in self._control.findall(text))

    @property
    def writes_spelt_as_text(self) -> bool:
        """Whether spelt control tokens need care; a tokenizer that splits special tokens has none in any text."""
        return self.prompting.control_tokens == "text" and not self.backend.encode_special_tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def end_of_turn(self, stops: Collection[int]) -> int | None:
        """The id of the stop or special token that the template writes after an assistant's turn.

        None without a template, or for one that ends a turn with plain text or with nothing, or fails.
        """
        if self.template is None:
            return None
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        try:
            text = self.rendered(turns, to_answer=False)
        except FAILURES as error:
            if isinstance(error, ArgumentError):
                raise
            return None  # the prompts will show what is wrong with the template
        _, found, tail = text.rpartition(ANSWER)
        if not found:
            return None
        ends = {*stops, *self._special_ids}
        for token_id in self.ids(tail):
            if token_id in ends:
                return token_id
            if self.decode([token_id]).strip():
                return None
        return None

    def stop_ids(self, path: Path) -> tuple[tuple[int, ...], int]:
        """The ids that end a response, and the one of them that is taught; of the model directory `path`.

        The first are the recipe's, or all that the files name: those in generation_config.json (else config.json), the
        tokenizer's EOS token, and the end of a turn, which is the one that is taught; without a template that is the
        tokenizer's EOS token. Raises PathError `not_a_model` if nothing names one: no response would end.
        """
        eos = self.names.get("eos_token")
        own = None if eos is None else self.backend.token_to_id(eos)
        named = {*eos_token_ids(path, {} if own is None else {own: str(eos)}), *([own] if own is not None else [])}
        end = self.end_of_turn(named)
        stops = tuple(self.prompting.eos_token_ids or sorted(named | ({end} if end is not None else set())))
        if not stops:
            raise PathError(
                "not_a_model",
                "No EOS id is named in generation_config.json, config.json, tokenizer_config.json or the chat "
                "template.",
                value=path,
                fix="Set the override 'prompting.eos_token_ids'.",
            )
        return stops, next((token_id for token_id in (end, own) if token_id in stops), stops[0])

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return dict(self.backend.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> set[int]:
        named = (self.backend.token_to_id(token) for token in self.names.values())
        return {token_id for token_id, token in self._added.items() if token.special} | {
            token_id for token_id in named if token_id is not None
        }

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """The control tokens by their text."""
        template = self.template or ""
        return {
            token.content: token_id
            for token_id, token in self._added.items()
            if token.content.strip()
            and (token.special or (token.content in template and _is_bracketed(token.content)))
            and token.content not in (THINK, END_THINK)
        }

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.control_tokens)}

    @property
    def _mark_start(self) -> str:
        return SPELT + self._nonce

    def _mark(self, kind: str, token: str) -> str:
        return f"{kind}{self._nonce}{self._numbers[token]}{CLOSE}"

    def _marked(self, value: Any) -> Any:
        """The value with a mark for each control token that a text in it spells; names of entries are left as is."""
        if isinstance(value, str):
            return self._control.sub(lambda found: self._mark(SPELT, found[0]), value)
        if isinstance(value, Mapping):
            return {name: self._marked(item) for name, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list | tuple) else value

    def _unmarked(self, text: str) -> str:
        tokens = list(self.control_tokens)
        mark = re.compile(f"{self._mark_start}(\\d+){CLOSE}")
        return mark.sub(lambda found: tokens[int(found[1])], text)

    def _ids_of_marked(self, text: str) -> list[int]:
        """Ids of a text in which the template's control tokens are marks, and those that are spelt are text."""
        ids = [
            self._own_ids.get(token_id, token_id) for token_id in self._blind.encode(text, add_special_tokens=False).ids
        ]
        written = [found[0] for found in re.finditer(f"{WRITTEN}{self._nonce}\\d+{CLOSE}", text)]
        control = set(self.control_tokens.values())
        if sum(token_id in control for token_id in ids) != len(written):
            raise DataError(
                "unknown_token",
                "A prompt spells a control token, and this tokenizer has no other form for that text.",
                value=", ".join(found for found in self.control_tokens if found in text)[:200],
                fix="Remove it from the prompt, or set 'prompting.control_tokens' to 'tokens'.",
            )
        return ids

    @cached_property
    def _blind(self) -> Tokenizer:
        """The tokenizer with marks in the place of control tokens: their own spelling is text to it."""
        content = json.loads(self.backend.to_str())
        for token in content["added_tokens"]:
            if token["content"] in self._numbers:
                token["content"] = self._mark(WRITTEN, token["content"])
        blind = Tokenizer.from_str(json.dumps(content))
        blind.encode_special_tokens = self.backend.encode_special_tokens
        return blind

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """Ids of added tokens by those that the blind tokenizer gives them."""
        own = {}
        for token_id, token in self._added.items():
            text = self._mark(WRITTEN, token.content) if token.content in self._numbers else token.content
            blind_id = self._blind.token_to_id(text)
            assert blind_id is not None, "every added token is in the blind tokenizer"
            own[blind_id] = token_id
        return own

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and after a text."""
        whole, bare = self.encoded("x"), self.encoded("x", framed=False)
        starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
        start = starts[-1] if starts else 0
        return whole[:start], whole[start + len(bare) :]


def load_chat_tokenizer(path: Path, prompting: PromptingRecipe, moment: datetime = NO_MOMENT) -> ChatTokenizer:
    """The tokenizer and template of a model directory, built of what its identity hashes.

    Raises PathError `unsafe_config`, IntegrityError `damaged_file`.
    """
    require_own_tokenizer(path)
    try:
        backend = Tokenizer.from_file(str(path / TOKENIZER_FILE))
    except Exception as error:  # tokenizers raises nothing more precise
        raise unusable_tokenizer(path, error) from error
    known = {token_id: text for text, token_id in backend.get_vocab(with_added_tokens=True).items()}
    special = special_tokens(path, known)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = dict.fromkeys([*special.names.values(), *special.extra])
    backend.add_tokens([AddedToken(text, special=True) for text in named if text not in added])
    backend.encode_special_tokens = special.split
    return ChatTokenizer(backend, chat_template(path), special.names, prompting, moment)


def unusable_tokenizer(path: Path, error: Exception) -> IntegrityError:
    """The error for a model directory whose tokenizer.json the library refuses."""
    return IntegrityError(
        "damaged_file",
        f"{TOKENIZER_FILE} cannot be used ({error}).",
        value=path / TOKENIZER_FILE,
        fix="Save the tokenizer again with tokenizer.save_pretrained(DIR).",
    )


def template_error(error: Exception) -> str:
    """What a template said when it failed, short and in one line."""
    kind = "" if isinstance(error, TemplateError) and type(error) is TemplateError else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def _texts_of(turns: Sequence[Turn]) -> list[str]:
    return [str(turn.get("content", "")) for turn in turns if turn.get("role") != "assistant"]


def _is_bracketed(text: str) -> bool:
    return text[0] in "<[" and text[-1] in ">]"
