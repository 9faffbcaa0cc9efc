"""Device, threads and seeded generators: everything that decides a run's bits besides its data."""

import ctypes
import hashlib
import platform
import sys
from dataclasses import dataclass

import torch

from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import RuntimeRecipe

# glibc's number of the setting, and bytes: a lower size costs more page faults than it saves (docs/performance.md)
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 4 << 20


@dataclass(frozen=True)
class Runtime:
    """The resolved place of computation."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    @property
    def trains_in_autocast(self) -> bool:
        """Whether training runs bf16 matmuls over fp32 weights."""
        return self.dtype is not torch.float32


def open_runtime(recipe: RuntimeRecipe) -> Runtime:
    """The runtime that the recipe asks for; sets torch's thread count for this process.

    Raises ResourceError `device_unavailable` if CUDA is asked for and absent.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device_unavailable",
            "This machine has no usable CUDA device.",
            value=recipe.device,
            fix="Set 'runtime.device' to 'cpu' or 'auto'.",
        )
    use_cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    torch.set_num_threads(recipe.threads)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]
    return Runtime(torch.device("cuda" if use_cuda else "cpu"), dtype, recipe.seed)


def return_large_blocks() -> None:
    """Let this process's glibc give freed blocks of 4 MiB or more back to the system, whatever was freed before.

    By default the first large block that is freed raises that size to its own, up to 32 MiB: tensors then come from a
    heap whose gaps grow, and the peak depends on the order of sizes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def seed_for(seed: int, *scope: object) -> int:
    """A 63-bit seed for one purpose, so that stages never share a random stream."""
    text = "/".join(map(str, (seed, *scope)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *scope: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded for one purpose on one device."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, *scope))


def hardware_name(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)"
