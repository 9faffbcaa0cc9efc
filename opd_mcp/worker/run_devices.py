"""The devices of a run's attempt: those that it leases here, its engines' among them, and those of other machines."""

from collections.abc import Sequence
from pathlib import Path

from opd_mcp.devices.hardware import Gpu, device_count, gpu_slot, gpus
from opd_mcp.devices.leases import Lease, LeaseFolder, Wish
from opd_mcp.planning.costs.admission import is_short, short_admission
from opd_mcp.planning.costs.estimates import engine_of, is_divided
from opd_mcp.schemas.recipes import MANAGED_ENGINES, RuntimeRecipe
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.store import Store
from opd_mcp.worker.engines import SPARE_BYTES, weight_bytes
from opd_mcp.worker.journal_reporter import JournalReporter
from opd_mcp.worker.pipeline import run_cancelled
from opd_mcp.worker.teams.far_ranks import FarRank, share_of


def runtime_here(runtime: RuntimeRecipe, hosts: Sequence[str]) -> RuntimeRecipe:
    """What of a run's devices is on this machine, the first of the job's."""
    if len(hosts) < 2 or not isinstance(runtime.devices, int):
        return runtime
    return runtime.model_copy(update={"devices": share_of(runtime.devices, len(hosts))[0]})


def far_ranks(runtime: RuntimeRecipe, lease: Lease, hosts: Sequence[str]) -> list[FarRank]:
    """The ranks on a job's other machines; `all` devices are as many there as here."""
    if len(hosts) < 2 or runtime.devices == 1:
        return []
    on_gpus = gpu_of(lease) is not None
    each = len(lease.slots) if on_gpus else max(1, len(lease.slots) // runtime.threads)
    shares = share_of(runtime.devices if isinstance(runtime.devices, int) else each * len(hosts), len(hosts))
    return [
        FarRank(host, number if on_gpus else None, hosts[0])
        for host, count in zip(hosts[1:], shares[1:], strict=True)
        for number in range(count)
    ]


def device_lease(
    store: Store,
    record: RunRecord,
    runtime: RuntimeRecipe,
    leases: LeaseFolder,
    reporter: JournalReporter,
    usable: list[Gpu] | None = None,
) -> Lease:
    """The lease of all the run's devices here: GPUs, or CPU slots for its threads; raises RunError `run_cancelled`.

    Raises ResourceError `device_unavailable` for more GPUs than there are. A short run also takes a
    device's slot for short runs, once its memory is free there. `usable` are the GPUs of a job; None: all here.
    """
    found = (
        []
        if runtime.device == "cpu"
        else sorted(gpus() if usable is None else usable, key=lambda gpu: -gpu.free_memory)
    )
    slots = [gpu_slot(gpu) for gpu in found] or leases.cpu_slot_names()
    count = device_count(runtime, len(found)) if uses_devices(record) else 1
    if not found:
        every = runtime.devices == "all" and uses_devices(record)
        count = len(slots) if every else min(count * runtime.threads, len(slots))
    wishes = [Wish(slots, count)]
    if is_short(record):
        wishes.append(Wish(leases.short_slots(slots), 1, short_admission(store, record, leases)))
    lease = leases.acquire_any(record.run_id, wishes, reporter.should_stop, record.expected_memory_bytes)
    if lease is None:
        raise run_cancelled()
    return lease


def uses_devices(record: RunRecord) -> bool:
    """Whether the run has a phase that several devices compute, here or on managed engines."""
    recipe, names = record.request.recipe, [phase.name for phase in record.request.phases]
    return any(is_divided(recipe, name) or engine_of(recipe, name) in MANAGED_ENGINES for name in names)


def rank_devices(runtime: RuntimeRecipe, lease: Lease) -> list[str | None]:
    """The device of each rank, a GPU's UUID or None for the CPU; nothing for a run of one process."""
    if runtime.devices == 1:
        return []
    gpus_held = [gpu_named(slot) for slot in lease.slots]
    if gpus_held[0] is not None:
        return gpus_held
    cpu: list[str | None] = [None]
    return cpu * (runtime.devices if isinstance(runtime.devices, int) else max(1, len(lease.slots) // runtime.threads))


def gpu_named(slot: str) -> str | None:
    """The UUID of a GPU's slot; None for the CPU."""
    _, separator, uuid = slot.partition("gpu-")
    return uuid if separator else None


def gpu_of(lease: Lease) -> str | None:
    """The UUID of the first leased GPU; None for the CPU."""
    return gpu_named(lease.slots[0])


def device_kind(lease: Lease) -> str:
    """`cuda` or `cpu`."""
    return "cpu" if gpu_of(lease) is None else "cuda"


def device_groups(model: Path, devices: Sequence[str | None], on_gpu: bool) -> list[tuple[str, ...]]:
    """The GPUs of each engine on these devices: one engine per GPU where every one holds the weights, else one on all.

    Without a GPU an engine per place in `devices`, with none.
    """
    named = [device for device in devices if device is not None]
    if not on_gpu or not named:
        return [()] * max(len(devices), 1)
    room = min((gpu.free_memory for gpu in gpus() if gpu.uuid in named), default=0)
    fits = room >= 2.2 * weight_bytes(model) + SPARE_BYTES  # as an engine's, and as the model here
    return [(device,) for device in named] if fits else [tuple(named)]
