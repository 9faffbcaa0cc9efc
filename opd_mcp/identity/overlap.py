"""Prompts that stand in two sets, as they are and but for spelling."""

import unicodedata
from collections.abc import Iterable


def eval_overlap(texts: list[str], evaluation: Iterable[str]) -> dict[str, int]:
    """How many prompts also stand in the evaluation set, as they are and normalised."""
    held_out = set(evaluation)
    normal = {normalised(text) for text in held_out}
    return {
        "eval_overlap_exact": sum(text in held_out for text in texts),
        "eval_overlap_normalised": sum(normalised(text) in normal for text in texts),
    }


def normalised(text: str) -> str:
    """Letters, digits, symbols and arithmetic signs of a text, without case, white space and other punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # - and * are punctuation to Unicode, but between digits they are what tells two sums apart
    kept = (c for c in folded if not c.isspace() and (c in "-*/%" or unicodedata.category(c)[0] not in "PZC"))
    return "".join(kept)
