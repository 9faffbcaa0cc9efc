"""Device leases: file locks in one per-user folder that all workspaces of the machine share.

A slot (`cpu-0.lock`, `gpu-<UUID>.lock`) is taken while its file is flocked, and the file then names its holder. A
waiting process holds a flocked ticket that names what it waits for, and only the oldest live ticket of a queue may take
slots. The kernel releases the locks of a process that ends, so a crash frees the device and the place in the queue.

Each device has one more slot, for short runs (`short-cpu`, `short-gpu-<UUID>`), with a queue of its own: a short run
waits in both queues and takes what is free first, so that it never waits for hours behind long ones.
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
SHORT = "short-"
QUEUES = ("short-cpu", "short-gpu", "cpu", "gpu")


@dataclass(frozen=True)
class Wish:
    """`count` slots of one kind; `admits` is asked before a free one is taken."""

    slots: Sequence[str]
    count: int = 1
    admits: Callable[[str], bool] = lambda slot: True

    @property
    def queue(self) -> str:
        """The queue of the slots' kind: CPU runs never wait behind GPU runs, nor short ones behind others."""
        kind = self.slots[0].removeprefix(SHORT).split("-", 1)[0]
        return f"{SHORT}{kind}" if self.slots[0].startswith(SHORT) else kind


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
    """A place in a device's queue: who is ahead, which slots it waits for and who holds them."""

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
        unit = {"cpu": "CPU slot", "gpu": "GPU", "short-cpu": "CPU slot for short runs"}.get(
            self.queue, "place for short runs on a GPU"
        )
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

    @staticmethod
    def short_slots(slots: Sequence[str]) -> list[str]:
        """The slots for short runs on the devices that these slots belong to."""
        return list(dict.fromkeys(SHORT + ("cpu" if slot.startswith("cpu-") else slot) for slot in slots))

    def acquire(self, owner: str, slots: Sequence[str], count: int, should_stop: Callable[[], bool]) -> Lease | None:
        """A lease of `count` of the slots once it is the owner's turn; None if `should_stop` came first."""
        return self.acquire_any(owner, [Wish(slots, count)], should_stop)

    def acquire_any(
        self, owner: str, wishes: Sequence[Wish], should_stop: Callable[[], bool], needs: int | None = None
    ) -> Lease | None:
        """A lease of the slots of the first wish that comes true; None if `should_stop` came first.

        `needs`: bytes of device memory that the owner is expected to use at most, for `needed`.
        """
        holder = owner if needs is None else f"{owner}\n{needs}"
        waiting = [(wish, self._draw_ticket(wish, owner), Lease([], [])) for wish in wishes]
        lease: Lease | None = None
        try:
            while lease is None and not should_stop():
                for wish, ticket, held in waiting:
                    if self._live_tickets(wish.queue)[:1] == [ticket.path.name]:
                        # Only the head of a queue takes slots: it may keep the first while it waits for the second.
                        self._take(held, holder, wish)
                        if len(held.slots) == wish.count:
                            lease = held
                            break
                else:
                    time.sleep(POLL_SECONDS)
            return lease
        finally:
            for _, ticket, held in waiting:
                if held is not lease:
                    held.release()
                ticket.path.unlink(missing_ok=True)
                os.close(ticket.descriptor)

    def place(self, owner: str) -> "Place | None":
        """Where the owner stands in its queue, and what it waits for; None when it does not wait.

        For a short run, its place in the queue of short runs.
        """
        for queue in QUEUES:
            tickets = self._live_tickets(queue)
            owners = [name.split("-", 1)[1] for name in tickets]
            if owner in owners:
                ahead = owners[: owners.index(owner)]
                wanted = _wanted(self.root / f"queue-{queue}" / tickets[len(ahead)])
                return Place(queue, ahead, wanted[0], wanted[1], self.holders(wanted[0]))
        return None

    def needed(self, slot: str) -> int | None:
        """Bytes of device memory that a slot's holder is expected to use at most: 0 without one, None if unknown."""
        if not self.busy([slot]):
            return 0
        _, _, needs = (self.root / f"{slot}.lock").read_text().partition("\n")
        return int(needs) if needs.isdigit() else None

    def holders(self, slots: Sequence[str]) -> list[str]:
        """The run ids that hold slots, in the order of the slots."""
        texts = [(self.root / f"{slot}.lock").read_text() for slot in self.busy(slots)]
        return [text.partition("\n")[0] or "another run" for text in texts]

    def busy(self, slots: Sequence[str]) -> list[str]:
        """The slots that a live process holds."""
        return [slot for slot in slots if _is_locked(self.root / f"{slot}.lock")]

    def _take(self, held: Lease, holder: str, wish: Wish) -> None:
        for slot in wish.slots:
            if len(held.slots) == wish.count:
                return
            descriptor = None if slot in held.slots else _try_lock(self.root / f"{slot}.lock")
            if descriptor is None:
                continue
            if not wish.admits(slot):
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
            held.slots.append(slot)
            held.descriptors.append(descriptor)

    def _draw_ticket(self, wish: Wish, owner: str) -> "_Ticket":
        with self._queue_guard(wish.queue) as folder:
            last = max((int(path.name.split("-", 1)[0]) for path in _tickets(folder)), default=0)
            path = folder / f"{max(last + 1, time.time_ns()):020d}-{owner}"
            descriptor = _try_lock(path)
            if descriptor is None:  # impossible: the name is new and the guard is held
                raise RuntimeError(f"ticket {path.name} is already locked")
            os.write(descriptor, json.dumps({"slots": list(wish.slots), "count": wish.count}).encode())
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
