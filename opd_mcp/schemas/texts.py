"""Texts and numbers as people read them: cut to size, bytes, durations."""


def shortened(text: str, characters: int) -> str:
    """The text, or its beginning and how many characters follow."""
    left = len(text) - characters
    return text if left <= 0 else f"{text[:characters]}… ({left} more characters)"


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
