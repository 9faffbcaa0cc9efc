"""Checkpoints of several ranks: each writes its own part, rank 0 seals them, and any number of ranks continues.

    step-00000120/rank-00000-of-00002.safetensors     rows/NAME: this rank's rows of what is divided; of several
                                                      replicas the first one's
                                                      whole/NAME: what all ranks have alike, from rank 0
                  rank-00001-of-00002.safetensors     random/cpu, random/cuda: this rank's random states
                  checkpoint.json                     as for one process

Collective operations are used on the training's thread only. The threads that write meet by the notes that each rank
leaves next to its file; a directory that is not sealed is no checkpoint.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_mcp.engine.context import Context
from opd_mcp.engine.training.checkpoints import (
    BUILDING_PREFIX,
    KEPT,
    RECORD_FILE,
    Checkpoints,
    copied,
    name_of,
    random_states,
    restore_random_states,
    saved_checkpoints,
)
from opd_mcp.engine.training.ranks import own_rows
from opd_mcp.engine.training.sharding import ShardedModel, local
from opd_mcp.identity.files import file_sha256, publish_directory, write_atomic
from opd_mcp.schemas.reports import CheckpointRecord, LoopState

ROWS, WHOLE, RANDOM = "rows/", "whole/", "random/"
NOTE_SUFFIX = ".sha256"
POLL_SECONDS = 0.01


class RankCheckpoints(Checkpoints):
    """`Checkpoints` of a sharded model: every rank calls each method at the same place of its training."""

    def __init__(
        self, sharded: ShardedModel, optimizer: torch.optim.Optimizer, fingerprint: str, context: Context
    ) -> None:
        super().__init__(sharded.model, optimizer, fingerprint, context)
        self._sharded, self._ranks = sharded, sharded.ranks

    def restored(self) -> LoopState | None:
        """The state of the newest intact checkpoint, put into every rank's model and optimizer; None without one."""
        directory = self.context.checkpoints
        if directory is None:
            return None
        first, steps = self._ranks.rank == 0, [0]
        if first and directory.is_dir():
            self._remove_leftovers(directory)
            steps = [int(path.name.rpartition("-")[2]) + 1 for path in reversed(saved_checkpoints(directory))] or [0]
        count = self._ranks.agreed(len(steps))[0]
        for number in self._ranks.agreed(*(steps if first else [0] * count)):  # counted from 1: 0 stands for none
            path = directory / name_of(number - 1)
            if number and (problem := self._shared_problem(path)) is None:
                return self._restore(path)
            if number and first:
                self._set_aside(path, problem or "another rank found it damaged")
        return None

    def is_due(self, step: int) -> bool:
        """Whether rank 0 finds a checkpoint due."""
        return bool(self._ranks.agreed(int(super().is_due(step)))[0])

    def save(self, state: LoopState, *, wait: bool = False) -> None:
        """Copy this rank's part now and write it while training continues; with `wait`, until all parts are sealed."""
        self._settle()
        directory = self.context.checkpoints
        if directory is None:
            return
        there = (directory / name_of(state.step)).is_dir()
        token = self._ranks.agreed(0 if there else 1 + secrets.randbits(60))[0]
        if not token:
            return
        started = time.monotonic()
        several = {"replicas": self._ranks.replicas} if self._ranks.replicas > 1 else {}
        record = self._record(state, self._ranks.device).model_copy(update=several)
        place = self.context.ranks
        assert place is not None, "several ranks have their places"
        part = _Part(directory, directory / f"{BUILDING_PREFIX}{token:016x}", place.rank, place.size, place.timeout)
        self._pending = self._thread.submit(part.write, record, self._part(), started, self.context.check_fence)
        self._last = time.monotonic()
        if wait:
            self._settle()
            self._ranks.agreed(0)  # no rank goes on before rank 0 has sealed

    def _part(self) -> dict[str, Tensor]:
        """Copies of what this rank writes."""
        parts = {f"{RANDOM}{name}": value for name, value in random_states().items()}
        for name, value in self._state():
            if isinstance(value, DTensor):
                if self._ranks.holds_first:
                    parts[f"{ROWS}{name}"] = value.to_local()
            elif self._ranks.rank == 0:
                parts[f"{WHOLE}{name}"] = value
        return {name: copied(value) for name, value in parts.items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights and their optimizer state by name."""
        for name, weight in self._sharded.trained().items():
            yield f"weight/{name}", weight.detach()
            for key, value in self.optimizer.state.get(weight, {}).items():
                yield f"{key}/{name}", value

    def _shared_problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; each rank looks at its share of the files, and one problem is everyone's."""
        problem = self._part_problem(path)
        found = self._ranks.add_up(torch.tensor(int(problem is not None), device=self._ranks.device))  # by every rank
        return problem or ("a part of it is not what was written" if int(found) else None)

    def _part_problem(self, path: Path) -> str | None:
        try:
            record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
        except (OSError, ValidationError):
            return f"{RECORD_FILE} is missing or not what was written"
        if record.fingerprint != self.fingerprint:
            return "it belongs to other settings or another model"
        if sorted(record.files) != [part_name(rank, len(record.files)) for rank in range(len(record.files))]:
            return "its parts are not those of ranks"
        for name in sorted(record.files)[self._ranks.rank :: self._ranks.size]:
            if not (path / name).is_file() or file_sha256(path / name) != record.files[name]:
                return f"{name} is missing or not what was written"
        return None

    def _restore(self, path: Path) -> LoopState:
        record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
        names, ranks = sorted(record.files), self._ranks
        with ExitStack() as stack, torch.no_grad():
            files = [stack.enter_context(safe_open(path / name, framework="pt")) for name in names]
            stored = {key for file in files for key in file.keys()}  # noqa: SIM118  not a mapping
            for name, weight in self._sharded.trained().items():
                if f"{ROWS}exp_avg/{name}" in stored or f"{WHOLE}exp_avg/{name}" in stored:
                    self.optimizer.state[weight] = _empty_moments(weight)
            for name, value in self._state():
                key = f"{ROWS}{name}" if isinstance(value, DTensor) else f"{WHOLE}{name}"
                if isinstance(value, DTensor):
                    rows = own_rows(value.shape[0], ranks.part, ranks.sharing)
                    _read_rows(files, key, rows, local(value))
                else:
                    value.copy_(files[0].get_tensor(key))
            if ranks.rank < len(files):
                own = files[ranks.rank]
                states = [key for key in own.keys() if key.startswith(RANDOM)]  # noqa: SIM118
                restore_random_states({key.removeprefix(RANDOM): own.get_tensor(key) for key in states})
        places: dict[str, tuple[Any, Any]] = {
            "device": (record.device, ranks.device.type),
            "number of devices": (len(names), ranks.size),
            "number of replicas": (record.replicas or 1, ranks.replicas),
        }
        self._tell_differences(record, places)
        self.context.reporter.resumed(record.state.step)
        return record.state


@dataclass(frozen=True)
class _Part:
    """One rank's part of a checkpoint that is being written."""

    directory: Path
    building: Path
    rank: int
    size: int
    timeout: float

    def write(
        self, record: CheckpointRecord, tensors: dict[str, Tensor], started: float, check_fence: Callable[[], None]
    ) -> float:
        """The seconds that it took since `started`, on rank 0 until all is sealed; raises what `check_fence` does."""
        check_fence()
        self.building.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = part_name(self.rank, self.size)
        save_file(tensors, self.building / name)
        write_atomic(self.building / f"{name}{NOTE_SUFFIX}", file_sha256(self.building / name))
        if self.rank == 0:
            try:
                self._seal(record, check_fence)
            except BaseException:
                shutil.rmtree(self.building, ignore_errors=True)
                check_fence()  # the next owner has removed what was being built: that is the cause
                raise
            for old in saved_checkpoints(self.directory)[:-KEPT]:
                check_fence()
                shutil.rmtree(old)
        return time.monotonic() - started

    def _seal(self, record: CheckpointRecord, check_fence: Callable[[], None]) -> None:
        names = [part_name(rank, self.size) for rank in range(self.size)]
        notes = {name: self.building / f"{name}{NOTE_SUFFIX}" for name in names}
        deadline = time.monotonic() + self.timeout
        while missing := [name for name, note in notes.items() if not note.is_file()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out waiting for {', '.join(missing)} of a checkpoint")
            time.sleep(POLL_SECONDS)
        files = {name: note.read_text() for name, note in notes.items()}
        for note in notes.values():
            note.unlink()
        write_atomic(self.building / RECORD_FILE, record.model_copy(update={"files": files}).sealed().to_json())
        publish_directory(self.building, self.directory / name_of(record.state.step), check_fence)


def leave_whole_moments(sharded: ShardedModel, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Let rank 0 write the optimizer's whole state, for the stretch of training that goes on with the saved weights."""
    moments: dict[str, Tensor] = {}
    for name, weight in sharded.trained().items():
        for key, value in optimizer.state[weight].items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if sharded.ranks.rank == 0:
                moments[f"{key}/{name}"] = copied(whole)
    if sharded.ranks.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        save_file(moments, file)


@torch.no_grad()
def restore_whole_moments(sharded: ShardedModel, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Go on with the state that `leave_whole_moments` wrote, of which each rank reads its part."""
    with safe_open(file, framework="pt") as opened:
        for name, weight in sharded.trained().items():
            optimizer.state[weight] = _empty_moments(weight)
            for key, value in optimizer.state[weight].items():
                if isinstance(value, DTensor):
                    rows = own_rows(value.shape[0], sharded.ranks.part, sharded.ranks.sharing)
                    _read_rows([opened], f"{key}/{name}", rows, local(value))
                else:
                    value.copy_(opened.get_tensor(f"{key}/{name}"))


def replicas_before(directory: Path | None, size: int) -> int | None:
    """How many replicas so many ranks held when they wrote the newest checkpoint; None where they wrote none."""
    for path in reversed([] if directory is None else saved_checkpoints(directory)):
        with suppress(OSError, ValidationError):
            record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
            return (record.replicas or 1) if sorted(record.files)[0] == part_name(0, size) else None
    return None


def part_name(rank: int, size: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _empty_moments(weight: nn.Parameter) -> dict[str, Tensor]:
    """The state of AdamW before the first step."""
    step = torch.zeros((), dtype=torch.float32, device=local(weight).device)
    return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def _read_rows(files: list[Any], key: str, rows: slice, into: Tensor) -> None:
    """Fill `into` with these rows of a tensor whose rows lie one after the other in the files that have some."""
    begin = 0
    for file in files:
        if key not in file.keys():  # noqa: SIM118  not a mapping; a rank of another replica wrote it
            continue
        part = file.get_slice(key)
        end = begin + part.get_shape()[0]
        first, last = max(rows.start, begin), min(rows.stop, end)
        if first < last:
            into[first - rows.start : last - rows.start] = part[first - begin : last - begin]
        begin = end
