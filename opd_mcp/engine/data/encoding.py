"""Prompts to token ids, by the chat template where the tokenizer has one, within a limit of time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.runtime import TooSlow, processor_seconds
from opd_mcp.identity.chat.rendering import NO_MOMENT
from opd_mcp.identity.chat.tokenizer import ChatTokenizer
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.tokenizers import reads_clock
from opd_mcp.schemas.errors import ArgumentError, DataError
from opd_mcp.schemas.recipes import PromptingRecipe

# far above what a template and a tokenizer take for a prompt
TEMPLATE_SECONDS = 20.0
TEMPLATE_SECONDS_A_ROW = 0.05


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt with its token ids."""

    row: PromptRow
    ids: list[int]


def encode_prompts(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, context: Context
) -> list[EncodedPrompt]:
    """Every prompt that fits `prompting.max_prompt_tokens`; the others are reported in an alert.

    Raises DataError `empty_data` if none fits, ArgumentError `too_slow` for a chat template that does not end.
    """
    limit = context.prompting.max_prompt_tokens
    chat = chat_of(tokenizer, context.prompting, context.rendered_at)
    with limited_rendering(len(rows)):
        encoded = [EncodedPrompt(row, chat.prompt_ids(row)) for row in rows]
        spelt = sum(bool(chat.spelt_control_tokens(row)) for row in rows)
    kept = [prompt for prompt in encoded if 0 < len(prompt.ids) <= limit]
    if len(kept) < len(encoded):
        context.reporter.alert(
            "prompts_dropped", f"{len(encoded) - len(kept)} of {len(encoded)} prompts are empty or over {limit} tokens."
        )
    if spelt:
        context.reporter.alert(
            "control_tokens_spelt",
            f"{spelt} of {len(rows)} prompts spell control tokens of the tokenizer; they are encoded as "
            f"{'text' if chat.writes_spelt_as_text else 'tokens'} (prompting.control_tokens).",
        )
    if not kept:
        raise DataError(
            "empty_data",
            f"No prompt has between 1 and {limit} tokens.",
            value=len(encoded),
            fix="Raise 'prompting.max_prompt_tokens' or give other prompts.",
        )
    return kept


def ids_of(prompts: Sequence[EncodedPrompt]) -> set[int]:
    """Every id that stands in one of the prompts."""
    return set().union(*(prompt.ids for prompt in prompts))


def chat_of(
    tokenizer: PreTrainedTokenizerBase, prompting: PromptingRecipe, moment: datetime = NO_MOMENT
) -> ChatTokenizer:
    """The tokenizer as prompts are encoded by it; its `chat_template` is the one that renders, at this moment."""
    names = dict(tokenizer.special_tokens_map)
    return ChatTokenizer(tokenizer.backend_tokenizer, tokenizer.chat_template, names, prompting, moment)


def recorded_moment(tokenizer: PreTrainedTokenizerBase, context: Context) -> str | None:
    """The moment of rendering as records name it; None for a template that does not ask for it."""
    return context.rendered_at.isoformat() if reads_clock(tokenizer.chat_template) else None


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
