"""Documents that lie end to end in one packed row: where each begins, and which of them are computed together."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

# On CUDA a document of this length fills a GPU, and SDPA has faster kernels for it than the variable-length attention.
LONG_DOCUMENT = 1024
# score entries of padding that cost as much as one more SDPA call (forward and backward) of a small model
SPARE_SCORES = 16384


@dataclass(eq=False)
class Documents:
    """Lengths of the documents that lie end to end in one packed row of T tokens, on `device`.

    Not frozen: torch's compiler looks into frozen dataclasses, and would compile anew for each number of documents.
    """

    lengths: list[int]
    device: torch.device
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def cumulative(self) -> Tensor:
        """Offsets int32 [N + 1]."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0).to(torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Position ids [1, T], counted from 0 in each document."""
        parts = [torch.arange(length) for length in self.lengths]
        return torch.cat(parts)[None].to(self.device) if parts else torch.zeros(1, 0, dtype=torch.long)

    @cached_property
    def runs(self) -> list[tuple[int, int, "Documents"]]:
        """The row in parts [start, stop): each long document alone, and the short ones between two of them together."""
        found: list[tuple[int, int, Documents]] = []
        start = 0
        for long, lengths in groupby(self.lengths, key=lambda length: length >= LONG_DOCUMENT):
            together = list(lengths)
            for part in [[length] for length in together] if long else [together]:
                found.append((start, start + sum(part), Documents(part, self.device)))
                start += sum(part)
        return found

    @cached_property
    def groups(self) -> list["DocumentGroup"]:
        """The documents as few padded attention calls."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        groups = []
        for first, last in attention_groups(self.lengths, SPARE_SCORES):
            lengths = self.lengths[first:last]
            width = max(lengths)
            places = torch.arange(width)[None] + torch.tensor(starts[first:last])[:, None]
            inside = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
            even = bool(inside.all())
            groups.append(
                DocumentGroup(
                    starts[first],
                    starts[last],
                    last - first,
                    width,
                    None if even else places.clamp_max(starts[last] - 1).flatten().to(self.device),
                    None if even else inside.flatten().nonzero()[:, 0].to(self.device),
                )
            )
        return groups

    def window_mask(self, width: int, window: int) -> Tensor:
        """True where a query may look: [L, L], the last `window` positions up to itself."""
        if (width, window) not in self._masks:
            distance = torch.arange(width, device=self.device)[:, None] - torch.arange(width, device=self.device)[None]
            self._masks[width, window] = (distance >= 0) & (distance < window)
        return self._masks[width, window]


def attention_groups(lengths: list[int], spare: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive documents that one padded attention call computes together.

    A document joins its predecessors while the padding costs at most `spare` score entries or an eighth of the work:
    below that a call of its own would cost more than the padding.
    """
    groups: list[tuple[int, int]] = []
    first, widest, work = 0, 0, 0
    for number, length in enumerate(lengths):
        grown, total = max(widest, length), work + length * length
        wasted = grown * grown * (number + 1 - first) - total
        if number > first and wasted > max(spare, total // 8):
            groups.append((first, number))
            first, grown, total = number, length, length * length
        widest, work = grown, total
    return [*groups, (first, len(lengths))] if lengths else groups


@dataclass(frozen=True)
class DocumentGroup:
    """N consecutive documents, tokens start … stop − 1, padded to one width; `places`, `inside` if lengths differ."""

    start: int
    stop: int
    documents: int
    width: int
    places: Tensor | None
    inside: Tensor | None

    def padded(self, states: Tensor) -> Tensor:
        """States [h, T, d] of the packed row as [N, h, L, d]."""
        chosen = states[:, self.start : self.stop] if self.places is None else states.index_select(1, self.places)
        return chosen.unflatten(1, (self.documents, self.width)).transpose(0, 1)

    def unpadded(self, states: Tensor) -> Tensor:
        """The inverse: [N, h, L, d] as [tokens, h, d]."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.inside is None else flat.index_select(0, self.inside)
