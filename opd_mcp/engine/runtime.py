"""The process that computes: device, threads, seeded generators, how fast it is, its memory, limits on its time."""

import ctypes
import hashlib
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import torch

from opd_mcp.engine.context import Context
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import RuntimeRecipe

PEAK_SIZE = {"cpu": 512, "cuda": 8192}
# glibc's number of the setting, and bytes: a lower size costs more page faults than it saves (docs/performance.md)
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 4 << 20


@dataclass(frozen=True)
class Runtime:
    """The device, the dtype and the seed of a computation; `divides`: models are loaded for ranks to divide."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    divides: bool = False

    @property
    def trains_in_autocast(self) -> bool:
        """Whether training runs bf16 matmuls over fp32 weights."""
        return self.dtype is not torch.float32


def open_runtime(settings: RuntimeRecipe) -> Runtime:
    """The runtime that the settings ask for; sets torch's thread count for this process.

    Raises ResourceError `device_unavailable` if CUDA is asked for and absent.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device_unavailable",
            "This machine has no usable CUDA device.",
            value=settings.device,
            fix="Set 'runtime.device' to 'cpu' or 'auto'.",
        )
    use_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    torch.set_num_threads(settings.threads)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    return Runtime(torch.device("cuda" if use_cuda else "cpu"), dtype, settings.seed)


def loading_runtime(runtime: Runtime, context: Context) -> Runtime:
    """Where a student is loaded for its training: on the device, or in the host's memory before ranks divide it."""
    return runtime if context.ranks is None else replace(runtime, device=torch.device("cpu"), divides=True)


def return_large_blocks() -> None:
    """Let this process's glibc give freed blocks of 4 MiB or more back to the system, regardless of earlier frees.

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


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matmul on the device, the best of a few."""
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


class TooSlow(Exception):
    """The work took more processor time than it was given."""


@contextmanager
def processor_seconds(limit: float) -> Iterator[None]:
    """Raise TooSlow inside when this process has spent `limit` seconds of processor time there.

    Python's matcher and interpreter both look at signals as they go; a main thread alone gets them, so work in
    another thread is not limited. Waiting and a suspended machine do not count. A native call that never returns to
    Python gets the signal again each second, which a process that hears this one's signals may count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
