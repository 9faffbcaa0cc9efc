"""Prompts to token ids, by the chat template where the tokenizer has one."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.templates import REFUSALS, limited_rendering, rendered
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.errors import DataError, OpdError


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
    with limited_rendering(len(rows)):
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

    Raises DataError `too_large` for a template that writes without end, `template_failed` for one that fails.
    """
    messages = [{"role": "user", "content": row.prompt}] if row.messages is None else list(row.messages)
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages)))
    try:
        text = rendered(tokenizer, messages, context.prompting.chat_template_kwargs, to_answer=True)
    except OpdError:
        raise
    except REFUSALS as error:
        raise DataError(
            "template_failed",
            f"The model's chat template fails on prompt {row.id} ({type(error).__name__}: {error}).",
            fix="Look at the model's chat_template.jinja and at the prompt's roles, or give another model.",
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False))
