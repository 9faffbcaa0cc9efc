"""The metrics of a run in 16 bytes per point, and the file that keeps a long journal's fold next to it.

`series.bin` holds what folding the journal's first bytes gave, and their sha256. It may be deleted: who reads it hashes
those bytes of the journal again and folds them afresh unless it is the fold of just these. Every process that may
write to the workspace may write it: each file is whole (renamed into place), and the last is as right as the others.
"""

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress, pairwise
from math import fsum, isfinite, isnan, nan
from pathlib import Path
from typing import Any

from opd_mcp.identity.files import write_atomic

SERIES_FILE = "series.bin"
MAGIC = b"opd-mcp fold 2\n"
HASH_BYTES = 32
BLOCK_BYTES = 1 << 20
# A shorter journal is folded afresh each time; a longer one is kept again once it has grown by this, or by a 16th.
KEPT_BYTES = 1 << 20


class Points(Mapping[int, float | None]):
    """One metric's values by step, in the order of the steps; None for one that was not finite."""

    __slots__ = ("numbers", "steps")

    def __init__(self, steps: "array[int] | None" = None, numbers: "array[float] | None" = None) -> None:
        self.steps = array("q") if steps is None else steps
        self.numbers = array("d") if numbers is None else numbers
        """NaN for a value that was not finite."""

    def __getitem__(self, step: int) -> float | None:
        place = bisect_left(self.steps, step)
        if place == len(self.steps) or self.steps[place] != step:
            raise KeyError(step)
        return self._value(place)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, value: float | None) -> None:
        """Add the value of a later step."""
        self.steps.append(step)
        self.numbers.append(value if value is not None and isfinite(value) else nan)

    def rewind(self, step: int) -> None:
        """Drop the values of later steps."""
        place = bisect_left(self.steps, step + 1)
        del self.steps[place:], self.numbers[place:]

    def keep_last(self, count: int) -> None:
        """Drop all but the last values."""
        del self.steps[:-count], self.numbers[:-count]

    def last(self) -> float | None:
        """The latest value; None without one, or where it was not finite."""
        return self._value(-1) if self.steps else None

    def finite(self) -> tuple["array[int]", "array[float]"]:
        """Steps and values without those that were not finite."""
        kept = list(map(isfinite, self.numbers))
        if all(kept):
            return self.steps, self.numbers
        return array("q", compress(self.steps, kept)), array("d", compress(self.numbers, kept))

    def not_finite(self) -> list[int]:
        """The steps whose values were not finite."""
        return list(compress(self.steps, map(isnan, self.numbers)))

    def _value(self, place: int) -> float | None:
        number = self.numbers[place]
        return number if isfinite(number) else None


def thinned(steps: Sequence[int], values: Sequence[float], max_points: int) -> tuple[list[int], list[float]]:
    """Steps and values, at most so many: the mean of each stretch, and the last point as it is."""
    if len(steps) <= max_points:
        return list(steps), list(values)
    stretches, body = max_points - 1, len(steps) - 1
    ends = [number * body // stretches for number in range(stretches + 1)]
    means = [fsum(values[start:end]) / (end - start) for start, end in pairwise(ends)]
    return [*(steps[end - 1] for end in ends[1:]), steps[-1]], [*means, values[-1]]


SeriesByName = dict[tuple[str, str], Points]
"""By phase and metric."""


@dataclass
class Fold:
    """What a journal's first `offset` bytes, which `digest` has taken in, fold to: `state` as JSON, and all series."""

    offset: int
    state: dict[str, Any]
    digest: Any
    series: SeriesByName = field(default_factory=dict)


def read_fold(directory: Path, journal: Path) -> Fold | None:
    """The fold kept in a run's directory; None unless there is one of the journal as it is."""
    try:
        data = (directory / SERIES_FILE).read_bytes()
        body = memoryview(data)[:-HASH_BYTES]
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != data[-HASH_BYTES:]:
            return None
        end = data.index(b"\n", len(MAGIC))
        header = json.loads(data[len(MAGIC) : end])
        digest = hash_of_beginning(journal, header["offset"])
        if digest is None or digest.hexdigest() != header["sha256"]:
            return None
        series: SeriesByName = {}
        at = end + 1
        for phase, name, count in header["series"]:
            points = Points()
            points.steps.frombytes(body[at : at + 8 * count])
            points.numbers.frombytes(body[at + 8 * count : at + 16 * count])
            series[phase, name] = points
            at += 16 * count
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Fold(header["offset"], header["state"], digest, series)


def write_fold(directory: Path, fold: Fold) -> None:
    """Keep a fold; where the disk or the rights do not allow it, none is kept."""
    index = [[phase, name, len(points)] for (phase, name), points in fold.series.items()]
    header = {"offset": fold.offset, "sha256": fold.digest.hexdigest(), "series": index, "state": fold.state}
    parts = [MAGIC, json.dumps(header).encode(), b"\n"]
    for points in fold.series.values():
        parts += [points.steps.tobytes(), points.numbers.tobytes()]
    body = b"".join(parts)
    with suppress(OSError):
        write_atomic(directory / SERIES_FILE, body + hashlib.sha256(body).digest())


def hash_of_beginning(path: Path, count: int) -> Any:
    """The sha256 object that has taken in a file's first bytes; None where the file is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while count:
            block = file.read(min(count, BLOCK_BYTES))
            if not block:
                return None
            digest.update(block)
            count -= len(block)
    return digest
