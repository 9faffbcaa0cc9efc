"""Bulk sampling by our generator and by HF `generate`: 256 prompts, up to 128 new tokens, with early stops."""

import random
from collections.abc import Callable

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import generate, left_padded
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.schemas.recipes import Sampling

VOCAB, BATCH, NEW_TOKENS = 512, 256, 128
# of 512 near-uniform tokens: a response has 85 tokens on average, and one in seven reaches the limit
STOPS = list(range(2, 10))


def generation_variants(*, quick: bool) -> dict[str, Callable[[], None]]:
    """Both on one random model of 0.85 M parameters, with the same prompts and temperature 1."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=STOPS,
        pad_token_id=0,
    )
    plain = Qwen3ForCausalLM(config).eval()
    packing = Qwen3ForCausalLM(config).eval()
    packing.load_state_dict(plain.state_dict())
    assert use_packed_attention(packing)
    generator, limit = random.Random(0), 64 if quick else NEW_TOKENS
    prompts = [[generator.randrange(10, VOCAB) for _ in range(generator.randrange(8, 40))] for _ in range(BATCH)]
    ids, mask = left_padded(prompts, plain.device)
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=True, top_k=0, eos_token_id=STOPS, pad_token_id=0, temperature=1.0
    )

    def ours() -> None:
        generate(packing, prompts, GenerationSettings(Sampling(max_new_tokens=limit), STOPS, BATCH, 0, "bench"))

    def hf_generate() -> None:
        torch.manual_seed(0)
        plain.generate(ids, attention_mask=mask, generation_config=settings)

    return {"ours": ours, "hf_generate": hf_generate}
