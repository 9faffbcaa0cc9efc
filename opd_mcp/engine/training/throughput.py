"""How fast a run trains: model FLOPs of a step, the matmul peak they are held against, and the memory they took."""

import resource
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

PEAK_SIZE = {"cpu": 512, "cuda": 8192}


def training_flops(model: PreTrainedModel, lengths: Sequence[int], response_tokens: int) -> float:
    """Operations that one step needs, forward and backward; recomputation is not counted.

    Six a parameter and token of the body, six a head parameter and response token, and causal attention's scores.
    Of a mixture of experts all experts are counted: an upper bound.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    table = model.get_input_embeddings().weight
    body = model.num_parameters() - table.numel()
    if model.get_output_embeddings().weight is not table:
        body -= head
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 6 * config.num_hidden_layers * config.num_attention_heads * width * sum(n * n for n in lengths)
    return float(6 * body * sum(lengths) + 6 * head * response_tokens + scores)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matmul on the device, the best of a few."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    # random values: constant ones switch fewer transistors, and a GPU then clocks higher than it ever does in training
    left = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, left)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's allocated peak on CUDA, this process's largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on either device."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
