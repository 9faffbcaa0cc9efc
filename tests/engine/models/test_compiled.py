"""Compiled decoder layers against plain ones. The backend "eager" traces as the GPU's does, and makes no kernels."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from opd_mcp.engine.models import attention, compiled
from opd_mcp.engine.models.attention import Documents, packed_hidden, use_packed_attention
from opd_mcp.engine.models.compiled import compile_layers, compiled_or_problem, is_compiled

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
SLIDING = ["sliding_attention", "full_attention"]
CLASSES: dict[str, PreTrainedConfig] = {
    "Qwen3": Qwen3Config(**SIZES, head_dim=16),
    "Gemma-3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5, layer_types=SLIDING),
}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "TRIAL_DOCUMENT", 37)
    # CUDA's attention returns a tensor of its own; the CPU's may be a view, for which a compiler makes code of its own
    by_document = attention._by_document
    monkeypatch.setattr(attention, "_by_document", lambda *arguments: by_document(*arguments).clone())
    before = torch._dynamo.config.allow_unspec_int_on_nn_module, torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.allow_unspec_int_on_nn_module, torch._dynamo.config.recompile_limit = before
    torch._dynamo.reset()


def made(name: str, *, training: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CLASSES[name]).train(training)
    assert use_packed_attention(model)
    return model


def hidden_and_gradients(model: PreTrainedModel, lengths: list[int]) -> list[torch.Tensor]:
    ids = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    model.zero_grad()
    hidden = packed_hidden(model, ids, Documents(lengths, model.device))
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * direction).sum().backward()
    return [hidden.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


def test_hidden_states_and_gradients_are_the_plain_ones() -> None:
    """Two kinds of layers; those of Qwen3 are compared below, by the trial."""
    model = made("Gemma-3")
    lengths = [40, 9, 25]
    plain = hidden_and_gradients(model, lengths)
    assert compiled_or_problem(model, autocast=False, backend="eager") is None
    assert is_compiled(model)
    for ours, theirs in zip(hidden_and_gradients(model, lengths), plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp_min(1e-6)


def test_one_compilation_serves_all_layers_and_any_number_of_documents_and_no_other_call() -> None:
    model = made("Qwen3")
    assert compiled_or_problem(model, autocast=False, backend="eager") is None
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ([200, 31], [300, 90, 20], [211, 100, 40, 11, 3]):
        hidden_and_gradients(model, lengths)
    with torch.no_grad():
        for length in (3, 5, 9):
            model(input_ids=torch.arange(length)[None])  # neither packed nor decoding: it stays plain
    assert counters["stats"]["unique_graphs"] == graphs, "nothing was compiled anew"


def failing(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    raise RuntimeError("no compiler here")


def wrong(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return lambda *values: tuple(1.1 * out if torch.is_tensor(out) else out for out in module(*values))


@pytest.mark.parametrize(
    ("backend", "problem"), [(failing, "cannot be compiled.*no compiler here"), (wrong, "differ from plain ones by")]
)
def test_a_compiler_that_fails_or_computes_something_else_is_not_used(
    backend: Callable[..., Any], problem: str
) -> None:
    model = made("Qwen3")
    plain = hidden_and_gradients(model, [12, 30])
    assert re.search(problem, compiled_or_problem(model, autocast=False, backend=backend) or "")
    assert not is_compiled(model)
    assert all(weight.grad is None for weight in model.parameters()), "the trial leaves no gradients"
    for ours, theirs in zip(hidden_and_gradients(model, [12, 30]), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_gpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILED_FROM", 0)
    model = made("Qwen3")
    assert compile_layers(model, autocast=False) is None
    assert not is_compiled(model)
