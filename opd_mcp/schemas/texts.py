"""Texts and numbers as people read them: cut to size, escaped, bytes, durations."""

import re

LINE_BREAK = "\n"
# Controls, bidirectional and other invisible marks, line separators, half surrogates, tags. Joiners stay: scripts need
# them, and so does the tab.
_ACTING = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str, keep: str = "") -> str:
    """The text with every character that acts instead of being shown made visible; those in `keep` stay.

    A control becomes its picture (a line break `␊`, an escape `␛`), anything else its number (`<U+202E>`).
    """
    return _ACTING.sub(lambda found: found[0] if found[0] in keep else _shown(ord(found[0])), text)


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def shortened(text: str, characters: int, advice: str = "") -> str:
    """The text, or its beginning with the number of characters left out and advice about them."""
    left = len(text) - characters
    if left <= 0:
        return text
    return f"{text[:characters]}… ({left} more characters{advice and f'; {advice}'})"


def shortened_bytes(text: str, size: int) -> str:
    """The text, or the beginning that fits, with an ellipsis, into `size` bytes of UTF-8."""
    content = text.encode(errors="replace")
    return text if len(content) <= size else f"{content[: size - 3].decode(errors='ignore')}…"


def byte_size(count: float) -> str:
    """A number of bytes with its unit, e.g. `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def duration(seconds: float) -> str:
    """A number of seconds with its unit, e.g. `3.5 min`."""
    if not seconds < 86400 * 365:
        return "over a year"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def line_end(text: str, characters: int) -> str:
    """The end of a text on one line, fit to stand between backquotes; white space alone is named as what it is."""
    if not text:
        return "(empty)"
    words = " ".join(text.split())
    if not words:
        return f"(only white space: {text[:8]!r})"
    return "…" + words.replace("`", "'")[-characters:]
