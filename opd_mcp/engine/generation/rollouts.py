"""From prompts to sequences with behaviour log-probs: the same function for cached and live rollouts."""

from collections.abc import Callable, Sequence

import numpy as np

from opd_mcp.engine.data.prompts import EncodedPrompt
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.schemas.recipes import Sampling


def draw_rollouts(
    policy: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    batch_size: int,
    seed: int,
    scope: str,
    valid_vocab: int | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Sequences:
    """One response of `policy` a prompt, with its log-probs (T = 1, untruncated) in `behaviour_logprobs`."""
    drawn = generate(
        policy.model,
        [prompt.ids for prompt in prompts],
        sampling,
        eos_token_ids=eos_token_ids,
        batch_size=batch_size,
        seed=seed,
        scope=scope,
        valid_vocab=valid_vocab,
        on_batch=on_batch,
    )
    logprobs = np.fromiter((value for row in drawn for value in row.logprobs), dtype=np.float32)
    return build_sequences(
        [prompt.ids for prompt in prompts],
        [row.response_ids for row in drawn],
        columns={"behaviour_logprobs": logprobs},
        finish_reasons=[row.finish_reason for row in drawn],
        prompt_row_ids=[prompt.row.id for prompt in prompts],
    )
