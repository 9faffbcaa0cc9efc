"""Chat templates: turns rendered within limits of time and size, and the token that ends an assistant's turn.

A model brings its own template, written by the model's author: it may refuse roles, fail, or never end.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.runtime import TooSlow, processor_seconds
from opd_mcp.schemas.errors import ArgumentError, DataError

# far above what a template and a tokenizer take for a prompt
TEMPLATE_SECONDS = 20.0
TEMPLATE_SECONDS_A_ROW = 0.05
MAX_RENDERED_CHARACTERS = 8 << 20
# What a template raises on turns that it has no place for; its expressions fail as Python's do.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)

QUESTION, ANSWER = "QUESTION", "ANSWER"

Turn = Mapping[str, Any]


@contextmanager
def limited_rendering(rows: int) -> Iterator[None]:
    """Raise ArgumentError `too_slow` inside when templates take far longer than `rows` rows should."""
    seconds = TEMPLATE_SECONDS + TEMPLATE_SECONDS_A_ROW * rows
    try:
        with processor_seconds(seconds):
            yield
    except TooSlow:
        raise ArgumentError(
            "too_slow",
            f"The chat template took more than {seconds:.0f} s for {rows} rows.",
            fix="Look at the model's chat_template.jinja; use a model whose template ends.",
        ) from None


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], options: Mapping[str, Any], *, to_answer: bool
) -> str:
    """The turns as the template writes them, `to_answer` with the beginning of the assistant's next turn.

    `options` are the recipe's `chat_template_kwargs`. Raises DataError `too_large` for a template that writes without
    end, one of `REFUSALS` for turns that it refuses.
    """
    text = str(
        tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=to_answer, tokenize=False, **options
        )
    )
    if len(text) > MAX_RENDERED_CHARACTERS:  # the tokenizer's native code would run beyond any limit of time
        raise DataError(
            "too_large",
            f"The chat template makes {len(text)} characters of a prompt, over {MAX_RENDERED_CHARACTERS}.",
            fix="Look at the model's chat_template.jinja, or give another model.",
        )
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase, stops: Collection[int], options: Mapping[str, Any]) -> int | None:
    """The id of the stop or special token that the template writes after an assistant's turn.

    None without a template, or for one that ends a turn with plain text or with nothing. Raises ArgumentError
    `too_slow` for a template that does not end.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        with limited_rendering(1):
            text = rendered(tokenizer, turns, options, to_answer=False)
    except REFUSALS as error:
        if isinstance(error, ArgumentError):
            raise
        return None  # the prompts will show what is wrong with the template
    _, found, tail = text.rpartition(ANSWER)
    if not found:
        return None
    ends = {*stops, *tokenizer.all_special_ids}
    ends |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in tokenizer.encode(tail, add_special_tokens=False):
        if token_id in ends:
            return int(token_id)
        if tokenizer.decode([token_id]).strip():
            return None
    return None
