"""Text to token ids: prompts by the chat template, teacher responses by their own ids or the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.runtime import TooSlow, processor_seconds
from opd_mcp.identity.data.rows import PromptRow, ResponseRow
from opd_mcp.schemas.errors import ArgumentError, DataError

# far above what a template and a tokenizer take for a prompt
TEMPLATE_SECONDS = 20.0
TEMPLATE_SECONDS_A_PROMPT = 0.05
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

    Raises DataError `empty_data` if none fits, ArgumentError `too_slow` for a chat template that does not end.
    """
    limit = context.prompting.max_prompt_tokens
    seconds = TEMPLATE_SECONDS + TEMPLATE_SECONDS_A_PROMPT * len(rows)
    try:
        with processor_seconds(seconds):
            encoded = [EncodedPrompt(row, prompt_ids(row, tokenizer, context)) for row in rows]
    except TooSlow:
        raise ArgumentError(
            "too_slow",
            f"The chat template took more than {seconds:.0f} s for {len(rows)} prompts.",
            fix="Look at the model's chat_template.jinja; use a model whose template ends.",
        ) from None
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

    Raises DataError `too_large` for a template that writes without end.
    """
    messages = [{"role": "user", "content": row.prompt}] if row.messages is None else list(row.messages)
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages)))
    text = str(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **context.prompting.chat_template_kwargs
        )
    )
    if len(text) > MAX_PROMPT_CHARACTERS:  # the tokenizer's native code would run beyond any limit of time
        raise DataError(
            "too_large",
            f"The chat template makes {len(text)} characters of a prompt, over {MAX_PROMPT_CHARACTERS}.",
            value=row.id,
            fix="Look at the model's chat_template.jinja, or give another model.",
        )
    return list(tokenizer.encode(text, add_special_tokens=False))


def response_sequences(
    rows: Sequence[ResponseRow],
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    *,
    eos_token_id: int,
    max_length: int,
) -> Sequences:
    """Prompt and response ids of every row that fits `max_length` tokens; the others are reported in an alert.

    Raises DataError `empty_data` if no row fits.
    """
    prompts, responses = [], []
    for row in rows:
        prompt = list(row.prompt_ids) if row.prompt_ids else prompt_ids(row.prompt, tokenizer, context)
        if row.response_ids is not None:
            response = list(row.response_ids)
        else:
            assert row.response is not None, "a response row has text or ids"
            response = [*tokenizer.encode(row.response, add_special_tokens=False), eos_token_id]
        if prompt and response and len(prompt) + len(response) <= max_length:
            prompts.append(prompt)
            responses.append(response)
    if len(prompts) < len(rows):
        context.reporter.alert(
            "responses_dropped",
            f"{len(rows) - len(prompts)} of {len(rows)} responses are empty, or over {max_length} tokens with prompt.",
        )
    if not prompts:
        raise DataError(
            "empty_data",
            f"No response fits {max_length} tokens.",
            value=len(rows),
            fix="Raise 'sft.max_length' or give other responses.",
        )
    return build_sequences(prompts, responses)
