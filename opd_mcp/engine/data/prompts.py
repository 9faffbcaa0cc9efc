"""Prompts as token ids: the chat template applied, over-long ones counted and reported."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.time_limit import time_limit
from opd_mcp.identity.data import PromptRow
from opd_mcp.schemas.errors import DataError

# A sound template takes microseconds and adds little to its prompt.
TEMPLATE_SECONDS = 10.0
MAX_PROMPT_CHARACTERS = 8 << 20


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt with its token ids."""

    row: PromptRow
    ids: list[int]


def encode_prompts(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, context: Context
) -> list[EncodedPrompt]:
    """Every prompt that fits `prompting.max_prompt_tokens`; the others are reported in an alert.

    Raises DataError `empty_data` if none fits.
    """
    limit = context.prompting.max_prompt_tokens
    encoded = [EncodedPrompt(row, prompt_ids(row, tokenizer, context)) for row in rows]
    kept = [prompt for prompt in encoded if 0 < len(prompt.ids) <= limit]
    if len(kept) < len(encoded):
        context.reporter.alert(
            "prompts_dropped", f"{len(encoded) - len(kept)} of {len(encoded)} prompts are empty or over {limit} tokens."
        )
    if not kept:
        raise DataError(
            "empty_data",
            f"No prompt has between 1 and {limit} tokens.",
            value=len(encoded),
            fix="Raise 'prompting.max_prompt_tokens' or give other prompts.",
        )
    return kept


def prompt_ids(row: PromptRow, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[int]:
    """Token ids of one prompt, with the chat template where the tokenizer has one.

    Raises DataError `unusable_template` for a template that fails, does not end, or writes without end.
    """
    messages = [{"role": "user", "content": row.prompt}] if row.messages is None else list(row.messages)
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages)))
    too_slow = partial(_unusable, row, f"it took more than {TEMPLATE_SECONDS} s")
    try:
        with time_limit(TEMPLATE_SECONDS, too_slow):
            text = str(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **context.prompting.chat_template_kwargs
                )
            )
    except (TemplateError, MemoryError, OverflowError) as error:
        raise _unusable(row, f"{type(error).__name__}: {error}"[:200]) from error
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise _unusable(row, f"it wrote {len(text)} characters")
    return list(tokenizer.encode(text, add_special_tokens=False))


def _unusable(row: PromptRow, why: str) -> DataError:
    return DataError(
        "unusable_template",
        f"The model's chat template cannot be used on a prompt: {why}.",
        value=f"prompt {row.id}",
        fix="Give the model its own chat template, or other prompts or 'prompting.chat_template_kwargs'.",
    )
