"""4-bit weights: the published table, the rounding's bound, and layers that compute as their dequantised weights."""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import distill_objective
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.models.lora import LoraLinear, adapters, add_adapter, lost_by_merging, merge, quantise, save_adapter
from opd_mcp.engine.models.nf4 import (
    BLOCK,
    LEVELS,
    Nf4Linear,
    Nf4Weight,
    dequantised,
    kernel_name,
    nf4_product,
    packed_weights,
    quantised,
    weight_bytes_held,
    weight_count,
)
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.activations import checkpointed_activations
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients, training_flops
from opd_mcp.identity.adapters import ADAPTER_WEIGHTS, BASE_QUANTIZATION, read_adapter
from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.identity.safetensors import file_metadata
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.recipes import AdapterRecipe, DistillRecipe

CPU, VOCAB = torch.device("cpu"), 23
RECIPE = AdapterRecipe(rank=3, alpha=5, quantization="nf4")


def test_the_levels_are_the_published_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: 8 positive and 7 negative quantiles, and a zero, scaled to 1."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2

    def half(count: int) -> list[float]:
        steps = [offset + (0.5 - offset) * number / (count - 1) for number in range(count)]
        return [NormalDist().inv_cdf(step) for step in steps[:-1]]

    values = sorted([*half(9), 0.0, *(-value for value in half(8))])
    assert [value / values[-1] for value in values] == pytest.approx(LEVELS, abs=2e-6)
    assert LEVELS[7:9] == (0.0, 0.07958029955625534)
    assert (LEVELS[0], LEVELS[1], LEVELS[14]) == (-1.0, -0.6961928009986877, 0.7229568362236023)


@given(seed=st.integers(0, 2**16), size=st.integers(1, 400), scale=st.sampled_from([1e-30, 1e-4, 0.02, 1.0, 1e4]))
def test_a_value_is_off_by_at_most_half_the_widest_gap_of_its_block(seed: int, size: int, scale: float) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    found = dequantised(*quantised(weight), weight.shape, torch.float32)
    widest = max(b - a for a, b in pairwise(LEVELS)) / 2
    padded = torch.nn.functional.pad(torch.stack([weight, found]), (0, -size % BLOCK)).view(2, -1, BLOCK)
    largest = padded[0].abs().amax(dim=1, keepdim=True)
    assert bool(((padded[0] - padded[1]).abs() <= largest * (widest + 1e-6)).all())
    again = dequantised(*quantised(found), weight.shape, torch.float32)
    assert torch.equal(again, found), "what is on the levels stays there"


def test_each_value_takes_its_nearest_level() -> None:
    levels = torch.tensor(LEVELS)
    weight = torch.linspace(-1, 1, 64 * 9)
    weight[::64], weight[1::64] = 1.0, -1.0  # every block's absmax is 1
    nearest = levels[(weight[:, None] - levels).abs().argmin(dim=1)]
    assert torch.equal(dequantised(*quantised(weight), weight.shape, torch.float32), nearest)


def test_zeros_and_a_last_block_that_is_not_full_survive() -> None:
    weight = torch.cat([torch.zeros(64), torch.tensor([3.0, -3.0, 0.0])])
    codes, absmax = quantised(weight)
    assert (len(codes), absmax.tolist()) == (64, [0.0, 3.0])
    assert torch.equal(dequantised(codes, absmax, weight.shape, torch.float32), weight)


def test_long_weights_are_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = [*quantised(weight), dequantised(*quantised(weight), weight.shape, torch.float32)]
    monkeypatch.setattr("opd_mcp.engine.models.nf4.CHUNK", 3 * BLOCK)
    pieces = [*quantised(weight), dequantised(*quantised(weight), weight.shape, torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_weight_takes_four_and_a_half_bits_and_a_normal_one_loses_nine_percent() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = Nf4Weight(weight)
    assert packed.bytes_held * 8 == 4.5 * weight.numel()
    lost = ((packed.dequantised() - weight).norm() / weight.norm()).item()
    assert 0.08 < lost < 0.10
    packed.to(torch.bfloat16)
    assert packed.absmax.dtype is torch.float32, "a cast does not round the scales"


def test_the_product_is_differentiated_by_the_dequantised_weight() -> None:
    weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantised(weight)
    dense = dequantised(codes, absmax, weight.shape, torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.equal(nf4_product(x, codes, absmax, 5), x @ dense.T)
    assert torch.autograd.gradcheck(lambda x: nf4_product(x, codes, absmax, 5), (x,))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(nf4_product, (x.float(), codes, absmax, 5), test_utils=checks)
    assert kernel_name(CPU) == f"torch {torch.__version__}"


@pytest.fixture
def rows() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(2, VOCAB, size=n).tolist() for n in (3, 9, 4, 6)] for _ in range(2))
    tokens = sum(map(len, responses))
    return build_sequences(
        prompts, responses, columns={"teacher_logprobs": -rng.exponential(size=tokens).astype(np.float32)}
    )


@pytest.fixture
def pair(tiny_model: Callable[..., PreTrainedModel]) -> Callable[[torch.dtype], list[PreTrainedModel]]:
    """A model with a 4-bit base, and one with the dequantised weights; both with the same adapter that is not zero."""

    def make(dtype: torch.dtype) -> list[PreTrainedModel]:
        made = []
        for packs in (True, False):
            model = tiny_model(VOCAB, seed=0, dtype=dtype, num_hidden_layers=2).train()
            assert use_packed_attention(model)
            quantise(model, CPU)
            if not packs:
                merge(model)
                model.to(dtype)
            add_adapter(model, RECIPE, seed=1)
            generator = torch.Generator().manual_seed(2)
            for layer in adapters(model).values():
                values = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64) / 9
                layer.lora_B.data = values.to(layer.wide)
            made.append(model)
        return made

    return make


def backward(model: PreTrainedModel, rows: Sequences, runtime: Runtime) -> float:
    model.zero_grad()
    data, settings = StepData(rows, np.arange(len(rows))), StepSettings("sample", 25, runtime)
    return accumulate_gradients(model, data, distill_objective(DistillRecipe()), settings).loss


def apart(models: list[PreTrainedModel]) -> float:
    """The largest relative difference of the adapters' gradients."""
    found = [torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]) for model in models]
    return ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_gradients_are_those_of_the_dequantised_weights(pair, rows, runtime, dtype, most, policy) -> None:
    models = pair(dtype)
    losses = []
    for model in models:
        with checkpointed_activations(model, policy):
            losses.append(backward(model, rows, runtime))
    assert losses[0] == pytest.approx(losses[1], rel=most)
    assert apart(models) <= most
    assert all(layer.weight is None and layer.packed is not None for layer in adapters(models[0]).values())


def test_gradients_in_bf16_are_those_of_the_dequantised_weights(pair, rows) -> None:
    models = pair(torch.bfloat16)
    for model in models:
        backward(model, rows, Runtime(CPU, torch.bfloat16, seed=0))
    assert apart(models) <= 1e-6


def test_a_compiled_layer_is_one_graph_with_the_same_gradients() -> None:
    """With forward and backward traced: a compiler that looked into the product could keep the dequantised weight."""
    torch.manual_seed(0)
    layer = LoraLinear(Nf4Linear(torch.nn.Linear(32, 16), CPU))
    layer.train_pair(torch.randn(2, 32), torch.randn(16, 2), 0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    found = []
    for forward in (layer, compiled):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 5 * 32).view(5, 32).requires_grad_()
        output = forward(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for plain, other in zip(*found, strict=True):
        assert torch.allclose(plain, other, rtol=1e-5, atol=1e-5)


def test_no_dequantised_weight_is_kept_for_the_backward(pair, rows, runtime) -> None:
    model, _ = pair(torch.float32)
    shapes = {layer.packed.shape for layer in adapters(model).values()}
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        backward(model, rows, runtime)
    assert shapes
    assert not shapes & set(kept)


def test_every_weight_is_counted_once_and_by_its_bytes(pair, tiny_model) -> None:
    model, dense = pair(torch.float32)
    added = sum(side.numel() for layer in adapters(model).values() for side in layer.trained())
    plain = tiny_model(VOCAB, seed=0, dtype=torch.float32, num_hidden_layers=2)
    assert weight_count(model) - added == plain.num_parameters() == weight_count(dense) - added
    assert training_flops(model, [7], 3) == training_flops(dense, [7], 3)
    linears = [module.weight for module in plain.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(weight.nbytes - 36 * -(-weight.numel() // 64) for weight in linears)
    assert weight_bytes_held(dense) - weight_bytes_held(model) == saved
    assert len(packed_weights(model)) == len(linears) == 14


def test_layers_without_an_adapter_are_in_4_bits_too_and_merging_dequantises_all(tiny_model) -> None:
    model = tiny_model(VOCAB, seed=0, dtype=torch.float32, hidden_size=64)
    ids = torch.arange(2, 12)[None]
    quantise(model, CPU)
    add_adapter(model, RECIPE.model_copy(update={"targets": ["q_proj"]}), seed=1)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    kinds = [type(module) for module in model.modules() if isinstance(module, Nf4Linear | LoraLinear)]
    assert (kinds.count(LoraLinear), kinds.count(Nf4Linear)) == (1, 6)
    assert lost_by_merging(model, torch.bfloat16) > 0.01
    with torch.no_grad():
        before = model(ids).logits
        merge(model)
        after = model(ids).logits
    assert not packed_weights(model)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.fixture
def saved(example: Path, tmp_path: Path, runtime: Runtime) -> tuple[PreTrainedModel, Path]:
    """An adapter on the example's student in 4 bits, and the model it was saved from."""
    base = example / "student"
    model = load_model(base, runtime, for_training=True, adapter=RECIPE).model.eval()
    for number, layer in enumerate(adapters(model).values()):
        layer.lora_B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    save_adapter(model, tmp_path / "adapter", base, inspect_model(base).identity)
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return model, tmp_path / "adapter"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 15)[None]).logits


def test_an_adapter_says_that_it_belongs_to_the_dequantised_base(saved, example, runtime) -> None:
    model, directory = saved
    assert read_adapter(directory).quantization == "nf4"
    loaded = load_model(directory, runtime)
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-5)
    plain = load_model(inspect_model(directory, form="plain"), runtime)
    assert not packed_weights(plain.model)
    assert not torch.allclose(logits(plain.model), logits(model), atol=1e-2)
    identities = [inspect_model(directory, form=form).identity for form in ("as_saved", "nf4", "plain")]
    assert identities[0] == identities[1]
    assert [identity.quantization for identity in identities] == ["nf4", "nf4", None]
    assert not identities[0].same_model(identities[2])
    assert full_weights_hash(directory) != full_weights_hash(directory, "plain")
    assert loaded.facts.identity == identities[0]
    whole = [inspect_model(example / "student", form=form).identity for form in ("as_saved", "nf4")]
    assert not whole[0].same_model(whole[1])
    assert whole[1].label().endswith("+nf4")


def test_a_base_that_is_quantised_in_an_unknown_way_is_refused(saved) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved[1] / ADAPTER_WEIGHTS
    save_file(load_file(weights), weights, file_metadata(weights) | {BASE_QUANTIZATION: "int3"})
    with pytest.raises(PathError, match="int3"):
        inspect_model(saved[1])


def test_what_is_quantised_are_the_stored_values_in_every_dtype(example: Path, runtime: Runtime) -> None:
    """A float32 student: rollouts in bf16 and a training that keeps float32 have the same 4-bit weights."""
    narrow = Runtime(CPU, torch.bfloat16, seed=0)
    facts = inspect_model(example / "student", form="nf4")
    trained = load_model(example / "student", runtime, for_training=True, adapter=RECIPE).model
    drawing = load_model(facts, narrow, generates=True).model
    assert drawing.dtype is torch.bfloat16
    for one, other in zip(packed_weights(trained), packed_weights(drawing), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.absmax, other.absmax)
    stored = load_model(example / "student", runtime).model
    name, layer = next((name, module) for name, module in drawing.named_modules() if isinstance(module, Nf4Linear))
    codes, absmax = quantised(stored.get_submodule(name).weight)
    assert torch.equal(layer.packed.codes, codes)
    assert torch.equal(layer.packed.absmax, absmax)
    assert prod(layer.packed.shape) == 2 * len(codes)


@pytest.mark.needs("bitsandbytes")
def test_bitsandbytes_reads_our_codes() -> None:
    import bitsandbytes  # noqa: F401

    weight = torch.randn(96, 130, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantised(weight)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", list(weight.shape), dtype)
        assert torch.allclose(theirs, dequantised(codes, absmax, weight.shape, dtype), rtol=1e-2, atol=0)
