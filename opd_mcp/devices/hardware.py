"""What the machine has: memory, disk and GPUs, found without torch."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from opd_mcp.identity.machine import container_limit, container_room
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.executors import ExecutorSettings
from opd_mcp.schemas.recipes import RuntimeRecipe

NVIDIA_SMI_SECONDS = 5


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver's tool lists it; memory in bytes."""

    uuid: str
    name: str
    total_memory: int
    free_memory: int


@dataclass(frozen=True)
class Target:
    """Where a run of a given recipe computes; `memory` is the free memory there, in bytes.

    `claimed` is the part of it that active runs will still use. `capacity` is all memory, free or not; 0: unknown.
    A training takes `devices` at once: GPUs of this memory each, or groups of CPU threads that share it. They are on
    `nodes` machines, equally many on each; 1 where that is not so.
    """

    kind: str
    name: str
    memory: int
    claimed: int = 0
    capacity: int = 0
    devices: int = 1
    nodes: int = 1

    @property
    def devices_per_node(self) -> int:
        """Those that are on one machine, whose memory they share where they are its CPU."""
        return self.devices // self.nodes


def gpus() -> list[Gpu]:
    """The GPUs that `nvidia-smi` lists; none without the tool, without a driver, or with a CPU build of torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch_build_uses_gpus():
        return []
    query = ["--query-gpu=uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [tool, *query],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (subprocess.SubprocessError, OSError):
        return []
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs in the tool's CSV answer (memory in MiB there); other lines are skipped."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit() and parts[3].isdigit():
            found.append(Gpu(parts[0], parts[1], int(parts[2]) << 20, int(parts[3]) << 20))
    return found


def torch_build_uses_gpus() -> bool:
    """Whether the installed torch is not marked as a CPU build; read from its metadata, not by importing it."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def available_memory() -> int:
    """Bytes of memory that a new process may use: free on the machine and within a container's limit."""
    free, room = int(psutil.virtual_memory().available), container_room()
    return free if room is None else min(free, room)


def total_memory() -> int:
    """Bytes of memory of the machine, or of a container's limit where that is less."""
    total, limit = int(psutil.virtual_memory().total), container_limit()
    return total if limit is None else min(total, limit)


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds the path."""
    return shutil.disk_usage(path).free


def gpu_slot(gpu: Gpu) -> str:
    """The name of a GPU's lease."""
    return f"gpu-{gpu.uuid}"


def device_count(runtime: RuntimeRecipe, gpus_here: int) -> int:
    """How many devices of this machine a training of this recipe takes; without a GPU, as many as its threads fill.

    Raises ResourceError `device_unavailable` for more GPUs than there are.
    """
    if not isinstance(runtime.devices, int):
        return gpus_here or max(1, (os.cpu_count() or 1) // runtime.threads)
    if gpus_here and runtime.devices > gpus_here:
        raise ResourceError(
            "device_unavailable",
            f"The recipe asks for {runtime.devices} GPUs, and {gpus_here} are visible here.",
            value=f"runtime.devices={runtime.devices}",
            fix="Lower runtime.devices, or set it to 'all'.",
        )
    return runtime.devices


def declared_target(runtime: RuntimeRecipe, name: str, executor: ExecutorSettings) -> Target:
    """What a run gets on an executor's machines, as the settings say.

    Raises ResourceError `device_unavailable` for more GPUs than a run gets there, or for one where there is none.
    """
    memory, nodes = int(executor.memory_gb * 1e9), executor.nodes if executor.kind == "slurm" else 1
    if executor.gpus and runtime.device != "cpu":
        there = executor.gpus * nodes
        devices = there if runtime.devices == "all" else device_count(runtime, there)
        text = f"a GPU of {name}" if devices == 1 else f"each of {devices} GPUs of {name}"
        even = _even_nodes(devices, executor.gpus, nodes)
        return Target("cuda", text, memory, capacity=memory, devices=devices, nodes=even)
    if runtime.device == "cuda":
        raise ResourceError(
            "device_unavailable",
            f"The recipe asks for a GPU, and a run gets none on the executor {name!r}.",
            value="runtime.device='cuda'",
            fix=f"Set gpus in [executors.{name}], or leave runtime.device at 'auto'.",
        )
    each = max(1, executor.cpus // runtime.threads)
    wanted = runtime.devices if isinstance(runtime.devices, int) else each * nodes
    threads = wanted * runtime.threads
    text = f"{threads} CPU thread{'s' if threads > 1 else ''} of {name}"
    return Target("cpu", text, memory, capacity=memory, devices=wanted, nodes=_even_nodes(wanted, each, nodes))


def _even_nodes(devices: int, each: int, most: int) -> int:
    """How many machines so many devices fill, `each` on one of `most`, where equally many are on each; else 1."""
    nodes = min(-(-devices // each), most)
    return nodes if devices % nodes == 0 else 1


def nodes_of(runtime: RuntimeRecipe, executor: ExecutorSettings) -> int:
    """How many of an executor's machines a run's devices are on; raises as `declared_target`."""
    if executor.kind != "slurm" or executor.nodes == 1:
        return 1
    target = declared_target(runtime, "", executor)
    each = executor.gpus if target.kind == "cuda" else max(1, executor.cpus // runtime.threads)
    return min(-(-target.devices // each), executor.nodes)


def visible_gpus(found: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """Those GPUs that a CUDA_VISIBLE_DEVICES lets a job use, by UUID or by place in the list; all without one."""
    if visible is None:
        return list(found)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [gpu for place, gpu in enumerate(found) if str(place) in names or any(gpu.uuid.startswith(n) for n in names)]


def target_of(runtime: RuntimeRecipe, busy: Callable[[Sequence[str]], Sequence[str]] = lambda slots: ()) -> Target:
    """The device that the recipe's runtime asks for; `busy` says which slots are leased.

    A leased GPU counts as free: a waiting run gets it when its holder ends. Raises ResourceError
    `device_unavailable` without a GPU.
    """
    found = [] if runtime.device == "cpu" else gpus()
    if found:
        devices = device_count(runtime, len(found))
        leased = busy([gpu_slot(gpu) for gpu in found])
        room = {gpu: gpu.total_memory if gpu_slot(gpu) in leased else gpu.free_memory for gpu in found}
        best = sorted(found, key=lambda gpu: -room[gpu])[devices - 1]  # of those that it would take, the fullest
        name = best.name if devices == 1 else f"each of {devices} x {best.name}"
        # which GPU it will be is not known before a lease: the smallest decides what fits any of them
        return Target("cuda", name, room[best], capacity=min(gpu.total_memory for gpu in found), devices=devices)
    if runtime.device == "cuda":
        raise ResourceError(
            "device_unavailable",
            "The recipe asks for a GPU, and none is visible here.",
            value="runtime.device='cuda'",
            fix="Leave runtime.device at 'auto' or set it to 'cpu'.",
        )
    devices = device_count(runtime, 0)
    threads = devices * runtime.threads
    name = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    return Target("cpu", name, available_memory(), capacity=total_memory(), devices=devices)
