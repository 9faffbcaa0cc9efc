"""The responses of one batch while they grow, and how the next token of each is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_mcp.engine.data.sequences import EOS, TRUNCATED
from opd_mcp.schemas.recipes import Sampling


@dataclass(frozen=True)
class Generated:
    """One response: token ids with the stop token, their log-probs (T = 1, untruncated), and why it ended."""

    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are drawn; the random stream depends on seed, scope and the number of the batch only.

    Ids at or above `valid_vocab` (a padded vocabulary's tail) are never drawn.
    """

    sampling: Sampling
    eos_token_ids: Sequence[int]
    batch_size: int
    seed: int
    scope: str
    valid_vocab: int | None = None


class BatchState:
    """Tokens and log-probs of `rows` responses, of which those at a place [n] of the batch are in work.

    A row that has ended keeps its place, and is drawn on, until another row takes the place or it is dropped with
    `keep`; those tokens are no part of its response. Every value stays on the device, so that no step waits for the
    host, and at its address until places are dropped, so that a step can be recorded.
    """

    def __init__(self, rows: int, vocab: int, settings: GenerationSettings, generator: torch.Generator) -> None:
        self.sampling, self.valid_vocab, self.generator = settings.sampling, settings.valid_vocab, generator
        self.limit = settings.sampling.max_new_tokens
        device = generator.device
        # what is drawn of rows that have reached the limit goes into the last column
        self.tokens = torch.zeros(rows, self.limit + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, self.limit + 1, device=device)
        self.lengths = torch.full((rows,), self.limit, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=device)
        stops = [token for token in settings.eos_token_ids if 0 <= token < vocab]
        self.is_stop = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.is_stop[torch.tensor(stops, dtype=torch.long, device=device)] = True

    def begin(self, first: int, count: int) -> None:
        """Give so many rows, from `first` on, a place each."""
        self.rows = torch.arange(first, first + count, device=self.rows.device)
        self.drawn = torch.zeros_like(self.rows)

    def join(self, places: Tensor, first: int) -> None:
        """Give these places [m] to the rows from `first` on."""
        self.rows.index_copy_(0, places, torch.arange(first, first + len(places), device=places.device))
        self.drawn.index_fill_(0, places, 0)

    def take(self, logits: Tensor, places: Tensor | None = None) -> Tensor:
        """Draw and record the next token of each place, or of these [m], from fp32 logits [n, V]; the tokens [n]."""
        drawn = draw_tokens(logits[:, : self.valid_vocab], self.sampling, self.generator)
        of_drawn = torch.log_softmax(logits, dim=-1).gather(1, drawn[:, None])[:, 0].float()
        rows, before = (self.rows, self.drawn) if places is None else (self.rows[places], self.drawn[places])
        column = before.clamp(max=self.limit)
        self.tokens.index_put_((rows, column), drawn)
        self.logprobs.index_put_((rows, column), of_drawn)
        stopped = self.stopped[rows]
        ends = self.is_stop[drawn] & ~stopped & (before < self.limit)
        self.lengths.index_copy_(0, rows, torch.where(ends, before + 1, self.lengths[rows]))
        self.stopped.index_copy_(0, rows, stopped | ends)
        if places is None:
            self.drawn += 1
        else:
            self.drawn.index_add_(0, places, torch.ones_like(places))
        return drawn

    def left(self) -> Tensor:
        """How many tokens may still be drawn at each place [n]; 0 where the row has ended."""
        return torch.where(self.stopped[self.rows], 0, self.limit - self.drawn).clamp(min=0)

    def going(self) -> Tensor:
        """At which of the places [n] the row has not ended."""
        return self.left() > 0

    def keep(self, kept: Tensor) -> None:
        """Drop all places but these, given by their numbers [m]."""
        self.rows, self.drawn = self.rows[kept], self.drawn[kept]

    def responses(self) -> list[Generated]:
        """The responses of all rows, each up to and with its first stop token."""
        ids, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        ends = zip(self.lengths.tolist(), self.stopped.tolist(), strict=True)
        return [
            Generated(ids[row][:length], logprobs[row][:length], EOS if ended else TRUNCATED)
            for row, (length, ended) in enumerate(ends)
        ]


def draw_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids [B] drawn from fp32 logits [B, V] at the given temperature and top-p; temperature 0 is greedy."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    # argmax of p / Exp(1) is an exact categorical draw, and far cheaper than multinomial for a large V
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    if sampling.top_p == 1:
        return (probabilities / noise).argmax(dim=-1)
    if probabilities.device.type != "cpu":  # how many candidates there are is a question that waits for the device
        return (nucleus(probabilities, sampling.top_p) / noise).argmax(dim=-1)
    return drawn_in_nucleus(probabilities, noise, sampling.top_p)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] with everything outside the smallest set of mass ≥ top_p set to zero (not renormalised).

    Of tokens with the same probability those with the lower ids come first.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(mass_before >= top_p, 0.0))


# Sums over a vocabulary in float32 are exact to far less than half of this.
LEAST_TAIL = 1e-4
# Tokens less likely than the likeliest one by more than this are mostly outside of the nucleus.
FAR_BELOW = 4096.0


def drawn_in_nucleus(probabilities: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """The argmax [B] of nucleus(probabilities) / noise, to the bit, where the nucleus is not asked for by most rows.

    The argmax over the whole vocabulary is that of the nucleus wherever it lies in it, which it does with probability
    top_p. It surely does where its own probability exceeds 1 − top_p, and where the tokens at least as likely have
    little enough mass.
    """
    drawn = (probabilities / noise).argmax(dim=-1)
    of_drawn = probabilities.gather(1, drawn[:, None])
    unsure = (of_drawn[:, 0] <= 1 - top_p + LEAST_TAIL).nonzero()[:, 0]
    if len(unsure) > 0:
        some, limit = _rows(probabilities, unsure), of_drawn[unsure]
        mass_before = torch.where(some >= limit, some, 0.0).sum(dim=-1) - limit[:, 0]
        outside = unsure[mass_before >= top_p - LEAST_TAIL / 2]
        if len(outside) > 0:
            drawn[outside] = drawn_among_candidates(_rows(probabilities, outside), _rows(noise, outside), top_p)
    return drawn


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values if len(rows) == len(values) else values[rows]


def drawn_among_candidates(probabilities: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """The argmax [B] of nucleus(probabilities) / noise, to the bit, without sorting what cannot be in the nucleus.

    Candidates hold more than top_p of the mass, so the nucleus ends among them. They stand in the order of their ids,
    which a stable sort keeps among equals.
    """
    candidate = probabilities >= least_candidate(probabilities, top_p)
    rows, ids = candidate.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(probabilities))
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    shape = (len(probabilities), int(counts.max()))
    packed = probabilities.new_zeros(shape).index_put_((rows, places), probabilities[rows, ids])
    noise = noise.new_ones(shape).index_put_((rows, places), noise[rows, ids])
    table = ids.new_zeros(shape).index_put_((rows, places), ids)
    best = (nucleus(packed, top_p) / noise).argmax(dim=-1)
    return table.gather(1, best[:, None])[:, 0]


def least_candidate(probabilities: Tensor, top_p: float) -> Tensor:
    """A probability [B, 1] of which the tokens at or above it have more than top_p of each row's mass [B, V].

    Tokens below (1 − top_p) / 2V have less than half of the rest together; where those near the likeliest token have
    enough, only they are taken.
    """
    rest = 1.0 - top_p
    if rest < LEAST_TAIL:
        return probabilities.new_zeros(len(probabilities), 1)
    surely = rest / (2 * probabilities.shape[1])
    near = (probabilities.amax(dim=-1, keepdim=True) / FAR_BELOW).clamp_min(surely)
    mass = torch.where(probabilities >= near, probabilities, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(mass >= top_p + LEAST_TAIL / 2, near, surely)
