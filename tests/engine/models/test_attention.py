"""Packed documents equal the same documents alone, for every class that we promise it for."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from opd_mcp.engine.models import attention
from opd_mcp.engine.models.attention import (
    Documents,
    hidden_rows,
    packed_attention,
    packed_hidden,
    packs,
    padded_hidden,
    use_packed_attention,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CLASSES: dict[str, PreTrainedConfig] = {
    "Qwen3": Qwen3Config(**SIZES, head_dim=16),
    "Llama": LlamaConfig(**SIZES),
    "Qwen2.5 with a sliding window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "Gemma-3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5, layer_types=SLIDING),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
LENGTHS = [40, 33, 12, 12, 11, 9, 3, 1, 1]


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    decoder = model.get_decoder()
    return torch.cat([decoder(input_ids=p[None], use_cache=False).last_hidden_state[0] for p in ids.split(LENGTHS)])


@pytest.mark.parametrize("name", CLASSES)
def test_packed_equals_alone_forward_and_backward(name: str) -> None:
    model = random_model(CLASSES[name])
    ids = torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    expected = alone(model, ids)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    assert use_packed_attention(model)
    together = packed_hidden(model, ids, Documents(LENGTHS, model.device))
    (together * direction).sum().backward()
    assert (together - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    for packed, single in zip(ours, gradients, strict=True):
        assert (packed - single).abs().max() <= 1e-4 * single.abs().max().clamp_min(1e-6)


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CLASSES["Qwen3"])
    assert use_packed_attention(model)
    seen: list[tuple[int, ...]] = []
    plain = attention.scaled_dot_product_attention

    def watched(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        assert kwargs["attn_mask"] is None
        seen.append(tuple(query.shape))
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    packed_hidden(model, torch.arange(250) % 97, Documents([200, 50], model.device))
    assert {shape[2] for shape in seen} == {200, 50}, "one call a document, none over all 250 tokens"


def test_padding_and_generation_run_as_before_on_a_model_that_packs() -> None:
    model = random_model(CLASSES["Gemma-3"])
    ids = torch.randint(97, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert use_packed_attention(model)
    assert (model(input_ids=ids, attention_mask=mask).logits - before)[mask.bool()].abs().max() <= 1e-5
    again = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert (again == generated).all()


def test_a_class_with_state_between_tokens_is_padded() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = random_model(config)
    assert not use_packed_attention(model)
    assert not packs(model)
    ids = torch.randint(97, (sum(LENGTHS),))
    rows = torch.tensor([0, 39, 40, sum(LENGTHS) - 1])
    assert (hidden_rows(model, ids, LENGTHS, rows) - alone(model, ids)[rows]).abs().max() <= 1e-5


def test_a_model_that_drops_attention_weights_is_padded_in_training_only() -> None:
    """Neither packed call knows dropout: found when the model is loaded, not at the first step."""
    assert use_packed_attention(random_model(Qwen3Config(**SIZES, head_dim=16, attention_dropout=0.1)))
    model = random_model(Qwen3Config(**SIZES, head_dim=16, attention_dropout=0.1)).train()
    assert not use_packed_attention(model)
    assert model.training
    ids = torch.randint(97, (sum(LENGTHS),))
    assert torch.isfinite(hidden_rows(model, ids, LENGTHS, torch.arange(sum(LENGTHS)))).all()


def test_padded_rows_give_the_same_hidden_states() -> None:
    model = random_model(CLASSES["Qwen3"])
    ids = torch.randint(97, (sum(LENGTHS),))
    padded = padded_hidden(model, ids, Documents(LENGTHS, model.device))
    assert (padded - alone(model, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}])
def test_what_changes_scores_is_refused(extra: dict[str, object]) -> None:
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="packed attention"):
        packed_attention(
            torch.nn.Module(), query, query, query, None, documents=Documents([3, 2], query.device), **extra
        )
