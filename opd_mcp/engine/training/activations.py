"""Activation checkpointing: chosen from a memory estimate, and switched on in the model's layers.

`full` keeps each layer's input and runs the layer again in the backward. `selective` keeps the outputs of matrix
products and of attention as well, so that only norms, activations and the like are computed again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import ceil, prod
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from opd_mcp.engine.models.compiled import decoder_layers, is_compiled
from opd_mcp.engine.models.lora import adapters
from opd_mcp.engine.models.nf4 import packed_weights, weight_bytes_held, weight_count
from opd_mcp.engine.runtime import Runtime
from opd_mcp.identity.machine import container_room, statistic
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.memory import AdapterSize, ModelShape, StepSize, TrainingMemory, training_memory
from opd_mcp.schemas.recipes import ActivationCheckpointing, Precision, VocabularySharing

KEPT_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
KEPT_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape that the memory estimate needs."""
    config = model.config.get_text_config()

    def setting(name: str) -> int | None:
        value = getattr(config, name, None)
        return value if type(value) is int else None

    added = sum(side.numel() for layer in adapters(model).values() for side in layer.trained())
    return ModelShape.of(weight_count(model) - added, config.vocab_size, setting)


def adapter_size(model: PreTrainedModel) -> AdapterSize | None:
    """The size of what is trained on a frozen model; None where all weights are trained."""
    layers = list(adapters(model).values())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if not layers or not trained:
        return None
    ranks = sum(len(side) for layer in layers for side in (layer.lora_A, layer.earlier_A) if side is not None)
    earlier = sum(side.numel() for layer in layers for side in (layer.earlier_A, layer.earlier_B) if side is not None)
    per_layer = ceil(ranks / max(model_shape(model).layers, 1))
    packed = sum(prod(weight.shape) for weight in packed_weights(model))
    return AdapterSize(trained, per_layer, model.get_input_embeddings().weight.itemsize, earlier, packed)


def step_memory(
    model: PreTrainedModel,
    precision: Precision,
    checkpointing: ActivationCheckpointing,
    *,
    tokens: int,
    runtime: Runtime,
    sharing: tuple[int, VocabularySharing, int] = (1, "auto", 1),
) -> TrainingMemory:
    """The estimate for micro-batches of `tokens`, `auto` resolved by what is free on the device now.

    `sharing`: how many ranks train the model, of which it is one's, what they do with the vocabulary, and how many
    replicas they hold. On the CPU they share the memory.

    Raises ArgumentError `invalid_argument` for a policy that the model's class cannot follow.
    """
    able = bool(decoder_layers(model))
    if not able and checkpointing in ("selective", "full"):
        raise ArgumentError(
            "invalid_argument",
            f"{type(model).__name__} cannot compute its activations again.",
            value=f"activation_checkpointing='{checkpointing}'",
            fix="Set 'activation_checkpointing' to 'auto' or 'none', and lower 'micro_batch_tokens' to save memory.",
        )
    held = weight_bytes_held(model)
    step, ranks = step_size(model, precision, tokens, runtime, sharing), sharing[0]
    if ranks > 1:
        free = free_memory(runtime.device) // (ranks if runtime.device.type == "cpu" else 1)
        return training_memory(model_shape(model), step, checkpointing, free + held // step.sharing)
    room = free_memory(runtime.device) + held
    return training_memory(model_shape(model), step, checkpointing if able else "none", room)


def step_size(
    model: PreTrainedModel,
    precision: Precision,
    tokens: int,
    runtime: Runtime,
    sharing: tuple[int, VocabularySharing, int] = (1, "auto", 1),
) -> StepSize:
    """A step of this model, with what `step_memory` calls so."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if runtime.trains_in_autocast else "float32"
    return StepSize(precision, tokens, dtype, runtime.device.type, is_compiled(model), adapter_size(model), *sharing)


def whole_memory(device: torch.device) -> int:
    """Bytes of the device, free or not; on the CPU of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return (statistic(Path("/proc/meminfo"), "MemTotal:") or 1 << 52) << 10


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; on the CPU what the machine and a container leave."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free, room = statistic(Path("/proc/meminfo"), "MemAvailable:") << 10, container_room()
    rooms = [value for value in (free or None, room) if value is not None]
    return min(rooms, default=1 << 62)  # a system that does not say: memory that runs out halves the micro-batch


@contextmanager
def checkpointed_activations(model: PreTrainedModel, policy: str) -> Iterator[None]:
    """Inside, the layers of the model (in training mode) keep what the policy says; gradients are the same."""
    if policy == "none":
        yield
        return
    again = partial(checkpoint, use_reentrant=False)
    if policy == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _what_is_kept))
    # the model's own switch would also put a hook on the embeddings, and has another name in each release
    for layer in decoder_layers(model):
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, again
    try:
        yield
    finally:
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = False


def _what_is_kept(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _kept_operations() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kept_operations() -> frozenset[object]:
    """The operations of this torch by the names above, and its variable-length attention."""
    found = [getattr(torch.ops.aten, name, None) for name in KEPT_PRODUCTS + KEPT_ATTENTION]
    found.append(getattr(torch.ops.torch_attn, "_varlen_attn", None))
    found.append(torch.ops.opd_mcp.nf4_product)
    return frozenset(packet.default for packet in found if packet is not None)
