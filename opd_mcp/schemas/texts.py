"""Texts and numbers as people read them: cut to size, bytes, durations."""


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
