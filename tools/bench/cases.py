"""What `engine.py` measures on, all seeded: tiny random models, rows of realistic lengths, and rollouts to score."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, RolloutInputs, ScoreInputs
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.engine.runtime import Runtime
from opd_mcp.schemas.recipes import RolloutRecipe, RuntimeRecipe, Sampling, ScoreRecipe
from tools import EXAMPLE

RUNTIME = Runtime(torch.device("cpu"), torch.float32, seed=0)
CONTEXT = Context(RuntimeRecipe(device="cpu"))


@dataclass(frozen=True)
class Case:
    """A model shape and the data of one step: lognormal lengths, 200 … 4096 divided by `shrink`."""

    vocab: int
    hidden: int
    layers: int
    rows: int
    quick_rows: int
    shrink: int
    budget: int


CASES = {
    "vocab_152k": Case(151_936, 256, 4, rows=24, quick_rows=6, shrink=8, budget=1024),
    "vocab_4k": Case(4096, 256, 4, rows=64, quick_rows=32, shrink=8, budget=1024),
    "lora": Case(151_936, 256, 4, rows=24, quick_rows=6, shrink=8, budget=1024),
    "deep": Case(32_768, 512, 16, rows=16, quick_rows=6, shrink=8, budget=1024),
    "packing": Case(4096, 256, 4, rows=32, quick_rows=16, shrink=4, budget=4096),
}


def build_model(case: Case) -> PreTrainedModel:
    """A random Qwen3 of the case's shape that packs its rows; tied embeddings, as small Qwen3 models have."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=max(1, case.hidden // 128),
        head_dim=64,
        intermediate_size=3 * case.hidden,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).train()
    assert use_packed_attention(model)
    return model


def build_data(case: Case, *, quick: bool) -> Sequences:
    """Rows with a quarter of their tokens as prompt, in random order, with stored teacher log-probs."""
    rng = np.random.default_rng(0)
    rows = case.quick_rows if quick else case.rows
    lengths = (rng.lognormal(6.5, 0.8, size=rows).clip(200, 4096) / case.shrink).astype(int)
    prompts = [rng.integers(case.vocab, size=max(1, length // 4)).tolist() for length in lengths]
    responses = [
        rng.integers(case.vocab, size=length - len(prompt)).tolist()
        for length, prompt in zip(lengths, prompts, strict=True)
    ]
    tokens = sum(map(len, responses))
    uniform = -np.log(case.vocab)
    return build_sequences(
        prompts, responses, columns={"teacher_logprobs": (uniform + rng.normal(size=tokens)).astype(np.float32)}
    )


def write_rollouts(scratch: Path, *, rows: int) -> None:
    """Rollouts of `rows` rows (`ours`) and of ten times as many (`ours_10x_rows`), in shards of `rows`."""
    for name, count in (("ours", rows), ("ours_10x_rows", 10 * rows)):
        recipe = RolloutRecipe(sampling=Sampling(max_new_tokens=64), count=count, batch_size=rows, shard_rows=rows)
        stages.rollout(
            recipe,
            RolloutInputs(student=EXAMPLE / "student", prompts=EXAMPLE / "opd.jsonl", tokenizer=EXAMPLE / "teacher"),
            scratch / name,
            CONTEXT,
        )


def scoring_run(scratch: Path, variant: str) -> Callable[[], None]:
    """The scoring stage on the rollouts of this name, ready to run."""

    def score() -> None:
        stages.score(
            ScoreRecipe(topk=8),
            ScoreInputs(
                teacher=EXAMPLE / "teacher",
                student=EXAMPLE / "student",
                rollouts=scratch / variant,
                allow_teacher_mismatch=True,
            ),
            scratch / f"cache-{variant}",
            CONTEXT,
        )

    return score
