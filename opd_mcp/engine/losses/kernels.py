"""Whether the Triton kernel runs on a device, tried once in a process."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def kernel_problem(device: torch.device) -> str | None:
    """Why the kernel cannot go over this device's tiles; None where it can.

    Triton comes with torch's CUDA wheels for Linux, but builds its launcher with the system's C compiler and Python's
    headers, which many containers lack. Plain torch then does the same work.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from opd_mcp.engine.losses.fused import row_sums

        outside = row_sums(torch.zeros(1, 8, device=device), torch.zeros(1, device=device)).outside
    except Exception as error:  # whatever Triton, its compiler or the C compiler raise; it is told, never hidden
        return f"Triton cannot build it here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    assert outside.item() == 8, "the kernel counts eight ones"
    return None
