"""Ranks: the processes that train one model together, and what they have to agree on.

They hold the model together, or replicas of it (hybrid sharding): one per node, or as many as the recipe asks for.
Rank 0 decides what depends on a clock or on the outside (when to stop, when to save). All others get its word by one
small broadcast, so that no rank waits in a collective operation that another one does not begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opd_mcp.engine.context import RankPlace
from opd_mcp.engine.data.batches import Group
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.parts import Arrays, Shares
from opd_mcp.schemas.resolve import require_even_replicas

# their names in torch 2.13, and before
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
MEETING_FILE, NOTES_FILE = "meeting", "notes"
# A rank may grade or load for long before it comes; the worker sees to one that never does.
MEETING_TIME = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, the mesh of all their devices, and where they leave notes.

    They hold `replicas` of the model. Ranks that follow each other hold one together; the mesh is then of two
    dimensions, replicas and the parts of one. Collective operations of either have the `timeout` of those of all.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    notes: dist.Store
    timeout: timedelta
    replicas: int = 1

    @property
    def sharing(self) -> int:
        """How many ranks hold one replica together."""
        return self.size // self.replicas

    @property
    def part(self) -> int:
        """Which of a replica's parts this rank holds, from 0 on."""
        return self.rank % self.sharing

    @property
    def holds_first(self) -> bool:
        """Whether this rank is one of those that hold the first replica."""
        return self.rank < self.sharing

    def replicated(self, replicas: int) -> "Ranks":
        """The same ranks that hold so many replicas; all of them call this at the same place.

        Raises ArgumentError `devices_unsupported` where the replicas would not be held by equally many.
        """
        if replicas == self.replicas:
            return self
        require_even_replicas(replicas, self.size)
        grid = torch.arange(self.size).view(replicas, -1)
        # groups that a mesh makes by itself would wait for half an hour
        groups = [dist.new_subgroups_by_enumeration(of.tolist(), timeout=self.timeout)[0] for of in (grid.T, grid)]
        mesh = DeviceMesh.from_group(groups, self.device.type, mesh=grid, mesh_dim_names=("replica", "part"))
        return replace(self, mesh=mesh, replicas=replicas)

    def agreed(self, *values: int) -> tuple[int, ...]:
        """Rank 0's values."""
        word = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.broadcast(word, src=0)
        return tuple(word.tolist())

    def wait_for_first(self, done: str) -> None:
        """Wait until rank 0 is here, too, however long its work takes; `done` is a name that is used once."""
        if self.rank == 0:
            self.notes.set(done, "yes")
        else:
            self.notes.wait([done], MEETING_TIME)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The tensor, in place the sum of all ranks'."""
        dist.all_reduce(tensor)
        return tensor

    def add_up_within(self, tensor: Tensor) -> Tensor:
        """The tensor, in place the sum of those of the N ranks that hold this rank's replica."""
        dist.all_reduce(tensor, group=self._within)
        return tensor

    def add_up_replicas(self, tensor: Tensor) -> Tensor:
        """The tensor, in place the sum of those of the ranks that hold the same part of each replica."""
        if self.replicas > 1 and tensor.numel():
            dist.all_reduce(tensor, group=self.mesh.get_group(0))
        return tensor

    def gathered(self, mine: Tensor) -> Tensor:
        """[N · n, …] of the tensors [n, …] of the N ranks that hold this rank's replica."""
        whole = torch.empty(self.sharing * len(mine), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        GATHER(whole, mine, group=self._within)
        return whole

    def exchanged(self, mine: Arrays) -> list[Arrays]:
        """Every rank's arrays, by rank; each has the same names, types and sizes but the first one."""
        assert self.replicas == 1, "the whole group exchanges"
        found: list[dict[str, NDArray[Any]]] = [{} for _ in range(self.size)]
        for name, values in mine.items():
            counts = self.gathered(torch.tensor([len(values)], device=self.device)).tolist()
            longest, shape = max(counts), values.shape[1:]
            padded = np.zeros((longest, *shape), dtype=values.dtype)
            padded[: len(values)] = values
            sent = torch.from_numpy(padded.reshape(-1).view(np.uint8)).to(self.device)
            whole = (self.gathered(sent) if longest else sent).cpu().numpy().view(values.dtype)
            parts = whole.reshape(self.size if longest else 0, longest, *shape)
            for rank, count in enumerate(counts):
                found[rank][name] = parts[rank, :count].copy() if longest else padded
        return list(found)

    def scattered_sum(self, whole: Tensor) -> Tensor:
        """This rank's [n, …] of the sum of the tensors [N · n, …] of the N ranks that hold its replica."""
        mine = torch.empty(len(whole) // self.sharing, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
        REDUCE_SCATTER(mine, whole, group=self._within)
        return mine

    @property
    def _within(self) -> dist.ProcessGroup | None:
        return self.mesh.get_group(1) if self.replicas > 1 else None


def joined(place: RankPlace, device: torch.device) -> Ranks:
    """The group of all ranks, once they are all there; a process joins one group in its life."""
    timeout = timedelta(seconds=place.timeout)
    if not dist.is_initialized():
        store = dist.FileStore(str(place.folder / MEETING_FILE), place.size)
        store.set(f"arrived/{place.rank}", "yes")
        store.wait([f"arrived/{rank}" for rank in range(place.size)], MEETING_TIME)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
    notes = dist.FileStore(str(place.folder / NOTES_FILE), -1)
    return Ranks(place.rank, place.size, device, init_device_mesh(device.type, (place.size,)), notes, timeout)


def shares_of(place: RankPlace | None, device: torch.device) -> Shares | None:
    """How the ranks share what each could compute; None for a process that is alone."""
    return None if place is None else Shares(place.rank, place.size, joined(place, device).exchanged)


# the micro-batches of one rank; None stands for an empty one, which only takes part in the collective operations
Share = list[Group | None]


def shares(groups: Sequence[Group], sequences: Sequences, size: int) -> list[Share]:
    """Each rank's micro-batches of a step, equally many; `groups` all have response tokens.

    Groups are halved rather than left over. The larger ones run at the same time, and go to the ranks that have had
    the fewest tokens so far. Every rank computes the same answer.
    """
    lengths, counts = sequences.lengths(), sequences.response_lengths()

    def tokens(group: Group) -> int:
        return int(lengths[group].sum())

    def halves(group: Group) -> tuple[Group, Group] | None:
        first, second = group[::2], group[1::2]
        return (first, second) if counts[first].sum() > 0 and counts[second].sum() > 0 else None

    left = sorted(groups, key=lambda group: (-tokens(group), int(group[0])))
    while len(left) % size:
        place, parts = next(((i, parts) for i, group in enumerate(left) if (parts := halves(group))), (0, None))
        if parts is None:
            break
        left[place : place + 1] = parts
        left.sort(key=lambda group: (-tokens(group), int(group[0])))
    load = np.zeros(size, dtype=np.int64)
    found: list[Share] = [[] for _ in range(size)]
    for first in range(0, len(left), size):
        together: list[Group | None] = [*left[first : first + size]]
        together += [None] * (size - len(together))
        for rank, group in zip(np.argsort(load, kind="stable").tolist(), together, strict=True):
            found[rank].append(group)
            load[rank] += 0 if group is None else tokens(group)
    return found


def rows_of(length: int, size: int) -> int:
    """Rows of a matrix of this length that each of the ranks holds; the last ones may hold fewer."""
    return -(-length // size)


def own_rows(length: int, rank: int, size: int) -> slice:
    """The rows that a rank holds, as `fully_shard` divides a tensor's first dimension."""
    rows = rows_of(length, size)
    return slice(min(rank * rows, length), min((rank + 1) * rows, length))
