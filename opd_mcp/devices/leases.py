"""Device leases: file locks in one per-user folder that all workspaces of the machine share.

A slot (`cpu-0.lock`, `gpu-<UUID>.lock`) is taken while its file is flocked, and the file then names its holder. A
waiting process holds a flocked ticket that names what it waits for, and only the oldest live ticket of a queue may take
slots. The kernel releases the locks of a process that ends, so a crash frees the device and the place in the queue.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from opd_mcp.store.workspace import require_private

POLL_SECONDS = 0.1
NAMED = 4


@dataclass
class Lease:
    """Slots held until `release` or the end of the process."""

    slots: list[str]
    descriptors: list[int] = field(repr=False)

    def release(self) -> None:
        """Free the slots; a second call does nothing."""
        while self.descriptors:
            os.close(self.descriptors.pop())


@dataclass(frozen=True)
class Place:
    """A place in the queue of the CPU or of the GPUs: who is ahead, which slots it waits for and who holds them."""

    queue: str
    ahead: list[str]
    slots: list[str]
    count: int
    holders: list[str]

    @property
    def position(self) -> int:
        """1 for the next one."""
        return len(self.ahead) + 1

    def text(self) -> str:
        """What the owner waits for, e.g. `waits for a CPU slot: 2 of 2 held by sft-a, cache-b`."""
        unit = "CPU slot" if self.queue == "cpu" else "GPU"
        wanted = f"a {unit}" if self.count == 1 else f"{self.count} {unit}s"
        held = f": {len(self.holders)} of {len(self.slots)} held by {_names(self.holders)}" if self.holders else ""
        behind = f"; behind {_names(self.ahead)}" if self.ahead else ""
        return f"waits for {wanted}{held}{behind}"


class LeaseFolder:
    """The lock files and queues below one folder; `cpu_slots` runs of one thread fit on the CPU at a time."""

    def __init__(self, root: Path, cpu_slots: int) -> None:
        self.root = root
        self.cpu_slots = cpu_slots

    def cpu_slot_names(self) -> list[str]:
        """One slot per core."""
        return [f"cpu-{index}" for index in range(self.cpu_slots)]

    def acquire(self, owner: str, slots: Sequence[str], count: int, should_stop: Callable[[], bool]) -> Lease | None:
        """A lease of `count` of the slots once it is the owner's turn; None if `should_stop` came first.

        The queue is named after the kind of the slots (`cpu`, `gpu`), so CPU runs never wait behind GPU runs.
        """
        queue = _queue_name(slots)
        ticket = self._draw_ticket(queue, owner, slots, count)
        held = Lease([], [])
        try:
            while not should_stop():
                if self._live_tickets(queue)[:1] == [ticket.path.name]:
                    # Only the head of the queue takes slots, so it may keep the first while it waits for the second.
                    self._take(held, owner, slots, count)
                    if len(held.slots) == count:
                        return held
                time.sleep(POLL_SECONDS)
            held.release()
            return None
        finally:
            ticket.path.unlink(missing_ok=True)
            os.close(ticket.descriptor)

    def place(self, owner: str) -> "Place | None":
        """Where the owner stands in its queue, and what it waits for; None when it does not wait."""
        for queue in ("cpu", "gpu"):
            tickets = self._live_tickets(queue)
            owners = [name.split("-", 1)[1] for name in tickets]
            if owner in owners:
                ahead = owners[: owners.index(owner)]
                wanted = _wanted(self.root / f"queue-{queue}" / tickets[len(ahead)])
                return Place(queue, ahead, wanted[0], wanted[1], self.holders(wanted[0]))
        return None

    def holders(self, slots: Sequence[str]) -> list[str]:
        """The run ids that hold slots, in the order of the slots."""
        return [(self.root / f"{slot}.lock").read_text() or "another run" for slot in self.busy(slots)]

    def busy(self, slots: Sequence[str]) -> list[str]:
        """The slots that a live process holds."""
        return [slot for slot in slots if _is_locked(self.root / f"{slot}.lock")]

    def _take(self, held: Lease, owner: str, slots: Sequence[str], count: int) -> None:
        for slot in slots:
            if len(held.slots) == count:
                return
            descriptor = None if slot in held.slots else _try_lock(self.root / f"{slot}.lock")
            if descriptor is not None:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                held.slots.append(slot)
                held.descriptors.append(descriptor)

    def _draw_ticket(self, queue: str, owner: str, slots: Sequence[str], count: int) -> "_Ticket":
        with self._queue_guard(queue) as folder:
            last = max((int(path.name.split("-", 1)[0]) for path in _tickets(folder)), default=0)
            path = folder / f"{max(last + 1, time.time_ns()):020d}-{owner}"
            descriptor = _try_lock(path)
            if descriptor is None:  # impossible: the name is new and the guard is held
                raise RuntimeError(f"ticket {path.name} is already locked")
            os.write(descriptor, json.dumps({"slots": list(slots), "count": count}).encode())
            return _Ticket(path, descriptor)

    def _live_tickets(self, queue: str) -> list[str]:
        folder = self.root / f"queue-{queue}"
        if not folder.is_dir():
            return []
        # Under the guard every live ticket is locked, so an unlocked one is dead.
        with self._queue_guard(queue):
            live = []
            for path in _tickets(folder):
                if _is_locked(path):
                    live.append(path.name)
                else:
                    path.unlink(missing_ok=True)
            return live

    def _make_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(self.root)

    @contextmanager
    def _queue_guard(self, queue: str) -> Iterator[Path]:
        folder = self.root / f"queue-{queue}"
        self._make_root()
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / ".guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Ticket:
    path: Path
    descriptor: int


def _names(owners: Sequence[str]) -> str:
    shown = list(dict.fromkeys(owners))
    return ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")


def _wanted(ticket: Path) -> tuple[list[str], int]:
    """The slots and the count that a ticket names; nothing for one that was removed meanwhile."""
    try:
        wanted = json.loads(ticket.read_bytes())
    except (FileNotFoundError, ValueError):
        return [], 1
    return wanted["slots"], wanted["count"]


def _queue_name(slots: Sequence[str]) -> str:
    return slots[0].split("-", 1)[0]


def _tickets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _try_lock(path: Path) -> int | None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    os.close(descriptor)
    return None


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
