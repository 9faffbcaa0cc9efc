"""The responses of one batch while they grow; every value stays on the device, so that no step waits for the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_mcp.engine.data.sequences import EOS, TRUNCATED
from opd_mcp.engine.generation.sampling import draw_tokens
from opd_mcp.schemas.recipes import Sampling


@dataclass(frozen=True)
class Generated:
    """One response: token ids with the stop token, their log-probs (T = 1, untruncated), and why it ended."""

    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Drawing:
    """Tokens and log-probs [B, limit] drawn so far, and the rows [n] of the batch that are still in work.

    Ids at or above `valid_vocab` (a padded vocabulary's tail) are never drawn. A row in work that has ended goes on
    being drawn until it is dropped with `keep`; what it draws is no part of its response.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        generator: torch.Generator,
        valid_vocab: int | None,
    ) -> None:
        self.sampling, self.generator, self.valid_vocab, self.limit = (
            sampling,
            generator,
            valid_vocab,
            sampling.max_new_tokens,
        )
        device = generator.device
        self.tokens = torch.zeros(rows, self.limit, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, self.limit, device=device)
        self.lengths = torch.full((rows,), self.limit, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        stops = [token for token in eos_token_ids if 0 <= token < vocab]
        self.is_stop = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.is_stop[torch.tensor(stops, dtype=torch.long, device=device)] = True

    def take(self, logits: Tensor) -> Tensor:
        """Draw and record the next token of each row in work from fp32 logits [n, V]; the tokens [n]."""
        drawn = draw_tokens(logits[:, : self.valid_vocab], self.sampling, self.generator)
        of_drawn = torch.log_softmax(logits, dim=-1).gather(1, drawn[:, None])[:, 0].float()
        self.tokens.index_put_((self.rows, self.step), drawn)
        self.logprobs.index_put_((self.rows, self.step), of_drawn)
        self.step += 1
        stopped = self.stopped[self.rows]
        ends = self.is_stop[drawn] & ~stopped
        self.lengths.index_copy_(0, self.rows, torch.where(ends, self.step, self.lengths[self.rows]))
        self.stopped.index_copy_(0, self.rows, stopped | ends)
        return drawn

    def going(self) -> Tensor:
        """Which of the rows in work [n] have not ended."""
        return ~self.stopped[self.rows]

    def keep(self, places: Tensor) -> None:
        """Go on with these of the rows in work only."""
        self.rows = self.rows[places]

    def responses(self) -> list[Generated]:
        """The batch's responses, each up to and with its first stop token."""
        ids, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        ends = zip(self.lengths.tolist(), self.stopped.tolist(), strict=True)
        return [
            Generated(ids[row][:length], logprobs[row][:length], EOS if ended else TRUNCATED)
            for row, (length, ended) in enumerate(ends)
        ]
