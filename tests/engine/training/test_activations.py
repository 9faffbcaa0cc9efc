"""The memory estimate against what autograd keeps, and checkpointed activations against plain ones."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE
from opd_mcp.engine.models.attention import Documents, packed_hidden, use_packed_attention
from opd_mcp.engine.models.lora import add_adapter
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training import activations as memory
from opd_mcp.engine.training.activations import checkpointed_activations, model_shape, step_memory
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.memory import (
    POLICIES,
    USABLE_SHARE,
    AdapterSize,
    ModelShape,
    StepSize,
    micro_tokens,
    training_memory,
)
from opd_mcp.schemas.recipes import AdapterRecipe

VOCAB = 13


@pytest.fixture
def rows() -> Sequences:
    rng = np.random.default_rng(0)
    return build_sequences(*([rng.integers(2, VOCAB, size=n).tolist() for n in (3, 5, 2, 8)] for _ in range(2)))


def gradients(model: PreTrainedModel, rows: Sequences, runtime: Runtime, policy: str) -> list[torch.Tensor]:
    model.zero_grad()
    with checkpointed_activations(model, policy):
        accumulate_gradients(model, StepData(rows, np.arange(4)), SFT_OBJECTIVE, StepSettings("token", 20, runtime))
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gradients_are_those_without_checkpointing(
    tiny_model: Callable[..., PreTrainedModel],
    runtime: Runtime,
    rows: Sequences,
    policy: str,
    packed: bool,
    dtype: torch.dtype,
) -> None:
    most = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    model = tiny_model(VOCAB, seed=0, dtype=dtype, num_hidden_layers=3, tie_word_embeddings=True).train()
    assert not packed or use_packed_attention(model)
    plain, again = (gradients(model, rows, runtime, name) for name in ("none", policy))
    for a, b in zip(plain, again, strict=True):
        assert (a - b).abs().max() <= most * a.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_autocast_gradients_are_those_without_checkpointing(
    tiny_model: Callable[..., PreTrainedModel], rows: Sequences, policy: str
) -> None:
    narrow = Runtime(torch.device("cpu"), torch.bfloat16, seed=0)
    model = tiny_model(VOCAB, seed=0, dtype=torch.float32, num_hidden_layers=2).train()
    assert use_packed_attention(model)
    for a, b in zip(*(gradients(model, rows, narrow, name) for name in ("none", policy)), strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max().clamp_min(1e-30)


def test_layers_run_twice_inside_and_once_after(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, rows: Sequences
) -> None:
    model = tiny_model(VOCAB, seed=0).train()
    runs: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    counts = []
    for policy in ("full", "selective", "none"):
        runs.clear()
        gradients(model, rows, runtime, policy)
        counts.append(len(runs))
    assert counts[0] == counts[1] == 2 * counts[2]


def kept_bytes(
    layers: int, dtype: torch.dtype, *, autocast: bool, tokens: int = 512, adapter: AdapterRecipe | None = None
) -> float:
    """Bytes that autograd keeps of the decoder's forward on packed documents, weights left out."""
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE | {"num_hidden_layers": layers})
    model = Qwen3ForCausalLM(config).to(dtype).train()
    assert use_packed_attention(model)
    if adapter is not None:
        add_adapter(model, adapter, seed=0)
    weights = {weight.data_ptr() for weight in model.parameters()}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(tokens) % 100
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        packed_hidden(model, ids, Documents([tokens // 4] * 4, ids.device))
    return sum(size for size, _ in storages.values())


SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [("fp32_master", "float32", False), ("fp32_master", "bfloat16", True), ("split_master", "float32", False)],
)
def test_a_layer_keeps_what_the_estimate_says(precision: str, dtype: str, autocast: bool) -> None:
    weights = torch.float32 if precision == "fp32_master" else torch.bfloat16
    measured = kept_bytes(3, weights, autocast=autocast) - kept_bytes(2, weights, autocast=autocast)
    shape = ModelShape.of(0, 128, SHAPE.get)

    def estimate(layers: int) -> int:
        shaped = ModelShape(**{**shape.__dict__, "layers": layers})
        return training_memory(shaped, StepSize(precision, 512, dtype, "cpu"), "none", 1 << 40).activations

    assert 1.0 <= (estimate(3) - estimate(2)) / measured <= 1.1


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [(torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "bfloat16")],
    ids=["float32", "autocast", "bf16"],
)
def test_a_layer_with_an_adapter_keeps_what_the_estimate_says(weights: torch.dtype, dtype: str) -> None:
    recipe, autocast = AdapterRecipe(rank=8), dtype == "bfloat16"
    three, two = (kept_bytes(layers, weights, autocast=autocast, adapter=recipe) for layers in (3, 2))
    measured = three - two
    shape = ModelShape.of(0, 128, SHAPE.get)

    def estimate(layers: int) -> int:
        shaped = ModelShape(**{**shape.__dict__, "layers": layers})
        step = StepSize("fp32_master", 512, dtype, "cpu", adapter=AdapterSize(0, 7 * 8, weights.itemsize))
        return training_memory(shaped, step, "none", 1 << 40).activations

    # autograd keeps autocast's bf16 copies of the frozen weights too, which are counted with the weights
    copies = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) if autocast and weights is torch.float32 else 0
    assert 1.0 <= (estimate(3) - estimate(2) + copies) / measured <= 1.1


def test_compiled_layers_are_counted_with_less_under_autocast_only() -> None:
    """On a GPU their step's peak is 0.94 to 0.97 of the estimate: `tools/gpu/check.py`."""
    shape = ModelShape.of(10**9, 128, SHAPE.get)

    def estimate(compiled: bool, dtype: str) -> int:
        step = StepSize("fp32_master", 512, dtype, "cuda", compiled)
        return training_memory(shape, step, "none", 1 << 40).activations

    assert 0.5 < estimate(True, "bfloat16") / estimate(False, "bfloat16") < 0.6
    assert estimate(True, "float32") == estimate(False, "float32")


def test_auto_takes_the_least_checkpointing_that_fits(
    tiny_model: Callable[..., PreTrainedModel], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(VOCAB, seed=0, dtype=torch.float32, num_hidden_layers=8)
    held = sum(weight.nbytes for weight in model.parameters())

    def chosen(room: int) -> str:
        monkeypatch.setattr(memory, "free_memory", lambda device: room - held)
        return step_memory(model, "fp32_master", "auto", tokens=1000, runtime=runtime).policy

    totals = {name: step_memory(model, "fp32_master", name, tokens=1000, runtime=runtime).total for name in POLICIES}
    assert totals["none"] > totals["selective"] > totals["full"]
    for name in POLICIES:
        assert chosen(int(totals[name] / USABLE_SHARE) + 1) == name
    assert chosen(1) == "full"


def test_a_class_without_such_layers_is_refused_by_name_and_auto_leaves_it_alone(runtime: Runtime) -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ArgumentError, match="OpenAIGPTLMHeadModel"):
        step_memory(model, "fp32_master", "full", tokens=10, runtime=runtime)
    assert step_memory(model, "fp32_master", "auto", tokens=10, runtime=runtime).policy == "none"


def test_a_micro_batch_holds_the_budget_or_a_longer_row_but_no_more_than_the_step() -> None:
    assert micro_tokens(100, 20, 1000) == 100
    assert micro_tokens(100, 300, 1000) == 300
    assert micro_tokens(100, 20, 60) == 60


def test_the_shape_is_the_one_that_the_config_says(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(VOCAB, seed=0)
    assert model_shape(model) == ModelShape(
        sum(weight.numel() for weight in model.parameters()), 1, 8, query_width=8, kv_width=4, intermediate=16, vocab=13
    )
