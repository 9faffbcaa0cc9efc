"""Which prompts an evaluation set also holds, as they are and normalised."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


def eval_overlap(texts: list[str], evaluation: Iterable[str]) -> dict[str, int]:
    """How many prompts the evaluation set also holds, as they are and normalised."""
    held_out = set(evaluation)
    normal = set(normalised_all(list(held_out)))
    return {
        "eval_overlap_exact": sum(text in held_out for text in texts),
        "eval_overlap_normalised": sum(text in normal for text in normalised_all(texts)),
    }


def normalised(text: str) -> str:
    """Letters, digits, symbols and arithmetic signs of a text, without case, white space and other punctuation."""
    if text.isascii():
        return text.encode().translate(_ASCII, _ASCII_DROPPED).decode()
    folded = unicodedata.normalize("NFKC", text).casefold().encode("utf-8", "surrogatepass")
    # Most characters are ASCII in most texts, and bytes are translated many times faster than characters.
    rest = folded.translate(None, _ASCII_DROPPED).decode("utf-8", "surrogatepass")
    return _NOT_ASCII.sub(lambda run: run[0].translate(_KEPT), rest)


def normalised_all(texts: Sequence[str]) -> list[str]:
    """Each text normalised; many ASCII texts at once, at a fraction of the time that they take one by one."""
    simple = [text for text in texts if text.isascii()]
    joined = "\0".join(simple)
    if not simple or joined.count("\0") != len(simple) - 1:
        return [normalised(text) for text in texts]
    done = joined.encode().translate(_ASCII, _ASCII_DROPPED_BUT_NUL).decode().split("\0")
    if len(simple) == len(texts):
        return done
    following = iter(done)
    return [next(following) if text.isascii() else normalised(text) for text in texts]


def _is_kept(character: str) -> bool:
    # - and * are punctuation to Unicode, but between digits they are what tells two sums apart
    return not character.isspace() and (character in "-*/%" or unicodedata.category(character)[0] not in "PZC")


class _Kept(dict[int, int | None]):
    """Whether a character stays, decided once per character: a plan compares whole data sets."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if _is_kept(chr(code)) else None
        return self[code]


_KEPT = _Kept()
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_ASCII = bytes(ord(chr(code).casefold()) if code < 128 else code for code in range(256))
_ASCII_DROPPED = bytes(code for code in range(128) if not _is_kept(chr(code)))
_ASCII_DROPPED_BUT_NUL = _ASCII_DROPPED.replace(b"\0", b"")
