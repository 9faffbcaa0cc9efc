"""Decoder layers compiled on CUDA: what lies between their matrix products becomes few kernels instead of dozens.

Only calls that repeat are compiled: packed rows, and decoding with a cache of fixed size. Attention and the cache stay
as they are, so one compilation serves all layers, any number of documents and any number of tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_mcp.engine.losses.logit_tiles import kernel_problem
from opd_mcp.engine.models.attention import Documents, packed_hidden, packs
from opd_mcp.engine.models.kv_cache import FixedCache
from opd_mcp.engine.models.nf4 import weight_count

# compiling takes some ten seconds: a smaller model is done before it pays
COMPILED_FROM = 50_000_000
# compilers choose their blocks by the first sizes they see, and take a size that equals a width for that width
TRIAL_DOCUMENT = 1997
# ‖compiled − plain‖ / ‖plain‖ of a layer's output and gradient: compiled code rounds to bf16 less often
MOST_DEVIATION = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# dtypes, modes and layer types of one process are compiled one by one; torch gives up after eight
VARIANTS = 64


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The model's decoder layers, as far as transformers can run them again in the backward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model's decoder layers are compiled."""
    return any(hasattr(layer.forward, "plain") for layer in decoder_layers(model))


def compile_layers(model: PreTrainedModel, *, autocast: bool) -> str | None:
    """Compile the layers of a large packing model on CUDA; None, or why they run as they are.

    Each layer is tried first with packed rows: its output, and in training mode its gradient, must be the plain
    layer's.
    """
    if model.device.type != "cuda" or not packs(model) or weight_count(model) < COMPILED_FROM:
        return None
    if (problem := kernel_problem(model.device)) is not None:
        return problem
    return compiled_or_problem(model, autocast=autocast)


def compiled_or_problem(model: PreTrainedModel, *, autocast: bool, backend: str = "inductor") -> str | None:
    """Compile the layers of a model that packs, of any size and on any device; or leave them, and say why.

    `backend` is one of torch's compilers: "eager" traces as "inductor" does, and makes no kernels.
    """
    # a layer's number would otherwise make each layer a compilation of its own
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    problem = None
    try:
        calls = _layer_calls(model)
        for layer in decoder_layers(model):
            layer.forward = _by_call(layer.forward, torch.compile(layer.forward, dynamic=True, backend=backend))
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
            deviation = max((_deviation(layer, *call) for layer, call in calls), default=0.0)
        narrow = autocast or model.dtype is torch.bfloat16
        most = MOST_DEVIATION[torch.bfloat16 if narrow else torch.float32]
        if not deviation <= most:
            problem = f"compiled layers differ from plain ones by {deviation:.2g}, more than {most}"
    except Exception as error:  # the compilers and a class's code raise many kinds; reported, never hidden
        problem = f"they cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    model.zero_grad(set_to_none=True)
    if problem is not None:
        for layer in decoder_layers(model):
            vars(layer).pop("forward", None)
    return problem


def _by_call(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that is compiled for packed rows and for caches of fixed size."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        repeats = kwargs.get("documents") is not None or isinstance(cache, FixedCache)
        return (compiled if repeats else plain)(*args, **kwargs)

    forward.plain = plain  # type: ignore[attr-defined]
    return forward


@torch.no_grad()
def _layer_calls(model: PreTrainedModel) -> list[tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What each layer, still plain, is called with when two documents are packed."""
    config = model.config.get_text_config()
    length = min(TRIAL_DOCUMENT, getattr(config, "max_position_embeddings", None) or TRIAL_DOCUMENT)
    ids = (torch.arange(2 * length, device=model.device) * 7 + 1) % config.vocab_size
    calls: list[tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((layer, (args, kwargs)))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        packed_hidden(model, ids, Documents([length, length], model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _deviation(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """‖compiled − plain‖ / ‖plain‖ of the layer's output, or of its gradient if that is larger."""
    plain = _output_and_gradient(layer, layer.forward.plain, args, kwargs)
    compiled = _output_and_gradient(layer, layer.forward, args, kwargs)
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(compiled, plain, strict=True))


def _output_and_gradient(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    hidden = args[0].detach().requires_grad_(layer.training)
    with torch.set_grad_enabled(layer.training):
        found = forward(hidden, *args[1:], **kwargs)
    output = found[0] if isinstance(found, tuple) else found
    if not layer.training:
        return [output.float()]
    direction = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    output.backward(direction)
    assert hidden.grad is not None, "a layer's output depends on its input"
    return [output.detach().float(), hidden.grad.float()]
