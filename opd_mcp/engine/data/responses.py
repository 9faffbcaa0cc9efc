"""Teacher responses as training sequences: exact token ids where we generated them, encoded text elsewhere."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import prompt_ids
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.identity.data.rows import ResponseRow
from opd_mcp.schemas.errors import DataError


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
