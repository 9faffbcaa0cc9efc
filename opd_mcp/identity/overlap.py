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
    return unicodedata.normalize("NFKC", text).casefold().translate(_KEPT)


class _Kept(dict[int, int | None]):
    """Whether a character stays, decided once a character: a plan compares whole data sets."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        # - and * are punctuation to Unicode, but between digits they are what tells two sums apart
        kept = not character.isspace() and (character in "-*/%" or unicodedata.category(character)[0] not in "PZC")
        self[code] = code if kept else None
        return self[code]


_KEPT = _Kept()
