"""Adapters: their gradients, the model they leave alone, and files that peft and this engine read alike."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, distill_objective
from opd_mcp.engine.models.attention import use_packed_attention
from opd_mcp.engine.models.compiled import compiled_or_problem, decoder_layers
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.models.lora import (
    adapters,
    add_adapter,
    load_adapter,
    lost_by_merging,
    merge,
    save_adapter,
    without_adapters,
)
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.activations import checkpointed_activations
from opd_mcp.engine.training.optim import build_optimizer
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients, training_flops
from opd_mcp.identity.adapters import read_adapter
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ArgumentError, PathError
from opd_mcp.schemas.recipes import AdapterRecipe, DistillRecipe, OptimizerRecipe

VOCAB, TOPK = 23, 3
RECIPE = AdapterRecipe(rank=3, alpha=5)
OBJECTIVES = {
    "sft": SFT_OBJECTIVE,
    "sampled": distill_objective(DistillRecipe(advantage_clip=1.0)),
    "topk_reverse_kl": distill_objective(DistillRecipe(estimator="topk_reverse_kl", topk=TOPK)),
    "topk_forward_kl": distill_objective(DistillRecipe(estimator="topk_forward_kl", topk=TOPK)),
}


@pytest.fixture
def rows() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(2, VOCAB, size=n).tolist() for n in (3, 9, 4, 6)] for _ in range(2))
    tokens = sum(map(len, responses))
    scores = rng.normal(size=(tokens, VOCAB))
    logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    best = np.argsort(-logprobs, axis=1)[:, :TOPK]
    columns = {
        "teacher_logprobs": -rng.exponential(size=tokens).astype(np.float32),
        "topk_ids": best.astype(np.int32),
        "topk_logprobs": np.take_along_axis(logprobs, best, axis=1).astype(np.float32),
    }
    return build_sequences(prompts, responses, columns=columns)


@pytest.fixture
def small(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`small(tied=…)`: two random layers that pack."""

    def make(*, tied: bool = False, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        model = tiny_model(VOCAB, seed=0, dtype=dtype, num_hidden_layers=2, tie_word_embeddings=tied).train()
        assert use_packed_attention(model)
        return model

    return make


def adapted(model: PreTrainedModel, recipe: AdapterRecipe = RECIPE) -> PreTrainedModel:
    """The model with an adapter that is not zero."""
    add_adapter(model, recipe, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in adapters(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64).to(layer.wide) / 9
    return model


def backward(model: PreTrainedModel, rows: Sequences, runtime: Runtime, objective: str = "sampled") -> float:
    model.zero_grad()
    data, settings = StepData(rows, np.arange(len(rows))), StepSettings("sample", 25, runtime)
    return accumulate_gradients(model, data, OBJECTIVES[objective], settings).loss


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 15)[None]).logits


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_are_the_chain_rule_on_those_of_the_merged_weights(
    small: Callable[..., PreTrainedModel], rows: Sequences, runtime: Runtime, objective: str, tied: bool, policy: str
) -> None:
    """dL/dA = s Bᵀ (dL/dW) and dL/dB = s (dL/dW) Aᵀ, in float64, in packed micro-batches."""
    model, whole = adapted(small(tied=tied)), adapted(small(tied=tied))
    merge(whole)
    assert not adapters(whole)
    with checkpointed_activations(model, policy):
        loss = backward(model, rows, runtime, objective)
    assert loss == pytest.approx(backward(whole, rows, runtime, objective), rel=1e-12)
    for name, layer in adapters(model).items():
        full = whole.get_submodule(name).weight.grad
        assert worst(layer.lora_A.grad, layer.scale * layer.lora_B.T @ full) <= 1e-12
        assert worst(layer.lora_B.grad, layer.scale * full @ layer.lora_A.T) <= 1e-12
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)


def test_all_linear_layers_are_adapted_and_nothing_else_is_trained(small: Callable[..., PreTrainedModel]) -> None:
    model = adapted(small())
    linears = {name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)}
    assert {f"model.{name}" for name in linears} == set(adapters(model))
    assert len(linears) == 2 * 7
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in adapters(model) for side in "AB"}


def test_the_head_forms_no_weight_gradient_where_it_is_frozen(
    small: Callable[..., PreTrainedModel], rows: Sequences, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4·R·V·H operations: two products of a [rows, V] tile instead of three."""
    from opd_mcp.engine.losses.logit_tiles import Head

    products: list[str] = []
    plain, adding = Head.product, Head.add_product
    monkeypatch.setattr(Head, "product", lambda *given, **named: (products.append("mm"), plain(*given, **named))[1])
    monkeypatch.setattr(Head, "add_product", lambda *given: (products.append("weight"), adding(*given))[1])
    backward(small(), rows, runtime)
    assert "weight" in products
    products.clear()
    model = adapted(small())
    backward(model, rows, runtime)
    assert "weight" not in products
    assert "mm" in products
    head, tokens = model.get_output_embeddings().weight.numel(), 7
    assert training_flops(model, [], tokens) == 4 * head * tokens
    assert training_flops(small(), [], tokens) == 6 * head * tokens


def test_operations_count_four_for_a_frozen_weight_and_six_for_a_trained_one(
    small: Callable[..., PreTrainedModel],
) -> None:
    plain, model = small(), adapted(small())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    table = plain.get_input_embeddings().weight.numel()
    body = plain.num_parameters() - 2 * table
    scores = training_flops(plain, [10], 0) - 6 * body * 10
    assert training_flops(model, [10], 0) == 4 * body * 10 + 6 * trained * 10 + scores


def test_the_optimizer_moves_the_adapter_alone(
    small: Callable[..., PreTrainedModel], rows: Sequences, runtime: Runtime
) -> None:
    model = adapted(small())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerRecipe(learning_rate=1e-2), seed=0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * len(adapters(model))
    backward(model, rows, runtime)
    optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad


def test_compiled_layers_give_the_same_gradients(
    small: Callable[..., PreTrainedModel], rows: Sequences, runtime: Runtime
) -> None:
    model = adapted(small(dtype=torch.float32))
    plain = backward(model, rows, runtime)
    expected = {name: layer.lora_A.grad.clone() for name, layer in adapters(model).items()}
    assert compiled_or_problem(model, autocast=False, backend="eager") is None
    assert all(hasattr(layer.forward, "plain") for layer in decoder_layers(model))
    assert backward(model, rows, runtime) == pytest.approx(plain, rel=1e-6)
    for name, layer in adapters(model).items():
        assert worst(layer.lora_A.grad, expected[name]) <= 1e-5


@pytest.mark.parametrize("base_bytes", [2, 4], ids=["bf16", "float32"])
def test_a_narrow_base_has_float32_adapters_and_gradients_under_autocast(
    small: Callable[..., PreTrainedModel], rows: Sequences, base_bytes: int
) -> None:
    model = adapted(small(dtype={2: torch.bfloat16, 4: torch.float32}[base_bytes]))
    narrow = Runtime(torch.device("cpu"), torch.bfloat16, seed=0)
    exact = adapted(small(dtype=torch.float32))
    backward(model, rows, narrow)
    backward(exact, rows, Runtime(torch.device("cpu"), torch.float32, seed=0))
    for name, layer in adapters(model).items():
        assert layer.lora_A.dtype is layer.lora_A.grad.dtype is torch.float32
        assert layer.weight.itemsize == base_bytes
        expected = adapters(exact)[name].lora_B.grad
        assert (layer.lora_B.grad - expected).norm() <= 0.1 * expected.norm()


def test_an_adapter_begins_at_zero_by_its_seed(small: Callable[..., PreTrainedModel]) -> None:
    plain, model, again, other = small(), small(), small(), small()
    add_adapter(model, RECIPE, seed=1)
    add_adapter(again, RECIPE, seed=1)
    add_adapter(other, RECIPE, seed=2)
    assert torch.equal(logits(model), logits(plain))
    for name, layer in adapters(model).items():
        assert torch.equal(layer.lora_A, adapters(again)[name].lora_A)
        assert not torch.equal(layer.lora_A, adapters(other)[name].lora_A)
        assert layer.lora_A.abs().max().item() <= layer.in_features**-0.5


def test_without_adapters_the_model_is_its_base_to_the_bit(small: Callable[..., PreTrainedModel]) -> None:
    plain, model = small(dtype=torch.float32), adapted(small(dtype=torch.float32))
    assert not torch.equal(logits(model), logits(plain))
    with without_adapters(model):
        assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(plain))


def test_rslora_scales_by_the_root_of_the_rank(small: Callable[..., PreTrainedModel]) -> None:
    assert AdapterRecipe().scale == 2.0
    assert AdapterRecipe(rank=16, alpha=8, scaling="rslora").scale == 2.0
    model = adapted(small(), AdapterRecipe(rank=4, alpha=8, scaling="rslora", init="gaussian"))
    assert {layer.scale for layer in adapters(model).values()} == {4.0}


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["q_prj"], "q_proj"), (["lm_head"], "No linear layer"), (["gate_proj", "norm"], "norm")],
)
def test_targets_that_no_layer_has_are_refused_by_name(small, targets: list[str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        add_adapter(small(), AdapterRecipe(targets=targets), seed=0)


def test_fused_experts_are_refused_by_name_and_attention_alone_is_adapted() -> None:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    for targets in (None, ["q_proj", "down_proj"]):
        with pytest.raises(ArgumentError, match="down_proj, gate_up_proj"):
            add_adapter(model, AdapterRecipe(targets=targets), seed=0)
    add_adapter(model, AdapterRecipe(targets=["q_proj", "o_proj"]), seed=0)
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"q_proj", "o_proj"}


@pytest.mark.parametrize(("size", "least", "most"), [(1e-5, 0.5, 2.0), (1e-1, 0.0, 0.01)])
def test_what_merging_into_bf16_loses_depends_on_the_size_of_the_delta(size, least, most, tiny_model) -> None:
    model = tiny_model(VOCAB, seed=0, dtype=torch.bfloat16, hidden_size=64, initializer_range=0.02)
    add_adapter(model, RECIPE, seed=1)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_()
        layer.lora_B.data *= size / layer.delta().std()
    assert least <= lost_by_merging(model, torch.bfloat16) <= most
    assert lost_by_merging(model, torch.float32) < 1e-2


@pytest.fixture
def saved(example: Path, tmp_path: Path, runtime: Runtime) -> tuple[PreTrainedModel, Path]:
    """An adapter of the example's student, and the model it was saved from."""
    loaded = load_model(example / "student", runtime, for_training=True, adapter=RECIPE)
    model = loaded.model.eval()
    for number, layer in enumerate(adapters(model).values()):
        torch.manual_seed(number)
        layer.lora_B.data.normal_(std=0.05)
    base = example / "student"
    save_adapter(model, tmp_path / "adapter", base, inspect_model(base).identity)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (base / name).is_file():
            (tmp_path / "adapter" / name).write_bytes((base / name).read_bytes())
    return model, tmp_path / "adapter"


def test_a_saved_adapter_is_loaded_with_its_base(saved, example: Path, runtime: Runtime) -> None:
    model, directory = saved
    files = read_adapter(directory)
    base = inspect_model(example / "student")
    assert (files.rank, files.scale, files.base_identity) == (3, pytest.approx(5 / 3), base.identity)
    loaded = load_model(directory, runtime)
    assert not [weight for weight in loaded.model.parameters() if weight.requires_grad]
    assert worst(logits(loaded.model), logits(model)) <= 1e-6
    facts = inspect_model(directory)
    assert facts.identity.weights != base.identity.weights
    assert facts.parameters == base.parameters + files.parameters
    assert facts.config == base.config


def test_an_adapter_on_an_adapter_is_saved_as_one_of_more_ranks(saved, runtime: Runtime, tmp_path: Path) -> None:
    """The new one starts at zero on what the student computes; nothing is rounded into the base."""
    model, directory = saved
    stacked = load_model(directory, runtime, for_training=True, adapter=AdapterRecipe(rank=2, targets=["q_proj"]))
    assert worst(logits(stacked.model.eval()), logits(model)) <= 1e-6
    trained = [weight for weight in stacked.model.parameters() if weight.requires_grad]
    assert len(trained) == 2 * sum(name.endswith("q_proj") for name in adapters(model))
    for layer in adapters(stacked.model).values():
        if layer.lora_B is not None:
            layer.lora_B.data.normal_(std=0.05)
    base = read_adapter(directory).base_directory()
    save_adapter(stacked.model, tmp_path / "both", base, inspect_model(base).identity)
    (tmp_path / "both" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert read_adapter(tmp_path / "both").rank == 3 + 2
    assert worst(logits(load_model(tmp_path / "both", runtime).model), logits(stacked.model)) <= 1e-6


def test_a_continued_adapter_goes_on_from_its_values(saved, runtime: Runtime) -> None:
    model, directory = saved
    recipe = RECIPE.model_copy(update={"continue_adapter": True})
    loaded = load_model(directory, runtime, for_training=True, adapter=recipe)
    for name, layer in adapters(loaded.model).items():
        assert torch.equal(layer.lora_B, adapters(model)[name].lora_B)
        assert layer.lora_B.requires_grad
        assert layer.earlier_A is None
    with pytest.raises(ArgumentError, match=r"rank to 3 and alpha to 5 in 'distill\.adapter"):
        load_model(directory, runtime, for_training=True, adapter=AdapterRecipe(continue_adapter=True))


def test_training_all_weights_of_an_adapted_student_begins_merged(saved, runtime: Runtime) -> None:
    model, directory = saved
    loaded = load_model(directory, runtime, for_training=True)
    assert not adapters(loaded.model)
    assert all(weight.requires_grad and weight.dtype is torch.float32 for weight in loaded.model.parameters())
    assert worst(logits(loaded.model.eval()), logits(model)) <= 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 4}, "lora_A.weight"),
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base"),
        ({"base_model_name_or_path": "org/name"}, "org/name"),
    ],
)
def test_what_is_more_than_a_plain_adapter_is_refused_by_name(saved, change: dict[str, object], said: str) -> None:
    _, directory = saved
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(PathError, match=said):
        inspect_model(directory)


@pytest.mark.needs("peft")
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_peft_loads_our_adapter_and_we_load_pefts(
    example: Path, runtime: Runtime, tmp_path: Path, scaling: str
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = example / "student"

    def plain() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base, local_files_only=True, attn_implementation="sdpa")

    recipe = AdapterRecipe(rank=4, alpha=6, scaling=scaling)
    loaded = load_model(base, runtime, for_training=True, adapter=recipe)
    ours = adapted_values(loaded.model.eval())
    save_adapter(ours, tmp_path / "ours", base, inspect_model(base).identity)
    theirs = PeftModel.from_pretrained(plain(), str(tmp_path / "ours")).eval()
    assert worst(logits(theirs), logits(ours)) <= 1e-6
    assert worst(logits(theirs), logits(plain())) > 1e-3

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", use_rslora=scaling == "rslora", task_type="CAUSAL_LM"
    )
    made = get_peft_model(plain(), config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            weight.data.normal_(std=0.05)
    made.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    again = load_model(tmp_path / "theirs", runtime)
    assert worst(logits(again.model), logits(made.eval())) <= 1e-6


def adapted_values(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random B."""
    for number, layer in enumerate(adapters(model).values()):
        torch.manual_seed(number)
        layer.lora_B.data.normal_(std=0.05)
    return model


@pytest.mark.needs("peft")
def test_peft_in_this_engine_gives_the_same_gradients(
    small: Callable[..., PreTrainedModel], rows: Sequences, runtime: Runtime
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    ours = adapted(small())
    targets = sorted({name.rpartition(".")[2] for name in adapters(ours)})
    theirs = small()
    inject_adapter_in_model(LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.alpha, target_modules=targets), theirs)
    theirs = theirs.double()
    for name, layer in adapters(ours).items():
        other = theirs.get_submodule(name)
        other.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        other.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    assert backward(ours, rows, runtime) == pytest.approx(backward(theirs, rows, runtime), rel=1e-12)
    for name, layer in adapters(ours).items():
        assert worst(layer.lora_A.grad, theirs.get_submodule(name).lora_A["default"].weight.grad) <= 1e-12


def test_a_loaded_adapter_needs_layers_of_its_shape(saved, tiny_model: Callable[..., PreTrainedModel]) -> None:
    _, directory = saved
    with pytest.raises(PathError, match="shape"):
        load_adapter(tiny_model(VOCAB, seed=0, dtype=torch.float32, num_hidden_layers=8), read_adapter(directory))
