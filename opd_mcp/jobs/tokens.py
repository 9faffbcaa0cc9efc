"""Prompt lengths in tokens, without transformers."""

from collections.abc import Sequence
from pathlib import Path

from opd_mcp.identity.data import PromptRow

SAMPLED_PROMPTS = 64


def mean_prompt_tokens(model: Path, rows: Sequence[PromptRow]) -> float | None:
    """Mean tokens of evenly sampled prompts, without the chat template's; None for a tokenizer that cannot be read."""
    from tokenizers import Tokenizer

    step = max(len(rows) // SAMPLED_PROMPTS, 1)
    texts = [_whole_text(row) for row in rows[::step][:SAMPLED_PROMPTS]]
    try:
        encodings = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(texts)
    except Exception:  # the Rust side raises bare Exception; a length for an estimate is no reason to fail
        return None
    return round(sum(len(encoding.ids) for encoding in encodings) / len(texts), 2)


def over_long_prompts(model: Path, rows: Sequence[PromptRow], limit: int) -> int:
    """Prompts of more than `limit` tokens, the chat template's not counted; 0 for a tokenizer that cannot be read."""
    from tokenizers import Tokenizer

    # A token is at least one byte, so a short text needs no tokenizer.
    texts = [text for row in rows if len((text := _whole_text(row)).encode(errors="replace")) > limit]
    if not texts:
        return 0
    try:
        encodings = Tokenizer.from_file(str(model / "tokenizer.json")).encode_batch(texts)
    except Exception:  # as above
        return 0
    return sum(len(encoding.ids) > limit for encoding in encodings)


def _whole_text(row: PromptRow) -> str:
    if row.prompt is not None:
        return row.prompt
    return "\n".join(str(message.get("content", "")) for message in row.messages or ())
