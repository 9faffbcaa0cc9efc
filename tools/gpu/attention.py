"""Attention over packed documents on one device: correctness and speed, a part of `check.py`."""

import json
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from opd_mcp.engine.models import attention
from opd_mcp.engine.models.attention import Documents, packed_attention
from tools.gpu.timing import Check, median_seconds

DOCUMENTS, ROUNDS = 2, 5


def attention_checks(device: torch.device, check: Check) -> dict[str, object]:
    """bf16 packed attention with grouped heads and a window against fp32 by document.

    On CUDA the two long documents have SDPA calls of their own, the short ones share a variable-length one.
    """
    found: dict[str, object] = {}
    lengths = [1500, 1300, 700, 300, 64, 1]
    documents = Documents(lengths, device)
    generator = torch.Generator().manual_seed(0)
    for label, heads, shared, window in (("plain", 8, 8, None), ("GQA", 8, 2, None), ("GQA, window 128", 8, 2, 128)):
        query = torch.randn(1, heads, sum(lengths), 64, generator=generator).to(device)
        key, value = (torch.randn(1, shared, sum(lengths), 64, generator=generator).to(device) for _ in range(2))

        def run(dtype: torch.dtype, inputs: tuple[Tensor, ...], window: int | None) -> list[Tensor]:
            leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
            output, _ = packed_attention(torch.nn.Module(), *leaves, None, documents=documents, sliding_window=window)
            return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

        name = f"packed attention, {label}"
        inputs = (query, key, value)
        pairs = zip(run(torch.bfloat16, inputs, window), run(torch.float32, inputs, window), strict=True)
        found[name] = check(name, max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs), 3e-2)
    return found


def attention_speeds(device: torch.device, length: int, heads: int, shared: int, width: int) -> dict[str, float]:
    """Milliseconds of forward and backward over two long bf16 documents: an SDPA call each, or one joint call.

    Medians of interleaved rounds. On the CPU both are SDPA.
    """
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> Tensor:
        made = torch.randn(1, count, DOCUMENTS * length, width, generator=generator)
        return made.to(device, torch.bfloat16).requires_grad_()

    leaves = [states(heads), states(shared), states(shared)]
    direction = torch.randn(1, DOCUMENTS * length, heads, width, generator=generator).to(device, torch.bfloat16)
    limits = {"sdpa_a_document": attention.LONG_DOCUMENT, "variable_length": DOCUMENTS * length + 1}

    def run(limit: int) -> None:
        with patch.object(attention, "LONG_DOCUMENT", limit):
            packed = Documents([length] * DOCUMENTS, device)
            output, _ = packed_attention(torch.nn.Module(), *leaves, None, documents=packed)
            torch.autograd.grad(output, leaves, direction)

    runs = {name: partial(run, limit) for name, limit in limits.items()}
    found = {name: 1000 * seconds for name, seconds in median_seconds(runs, device, ROUNDS).items()}
    print("attention, ms forward and backward", json.dumps({k: round(v, 3) for k, v in found.items()}), flush=True)
    return found
