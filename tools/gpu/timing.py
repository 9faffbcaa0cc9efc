"""Timing on one device: synchronized seconds, and medians of interleaved rounds."""

import statistics
import time
from collections.abc import Callable

import torch

Check = Callable[[str, float, float], dict[str, float]]
"""Records a deviation by its name and returns it with the most that is allowed."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each run over interleaved rounds, after a warm-up round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
