"""Training checkpoints: what a killed run needs to end with the weights that it would have had, to the bit.

A checkpoint is a directory `step-00000120` with the trained weights, optimizer state and random states as safetensors
and a sealed `checkpoint.json`; frozen weights are in none. It is written by a thread of its own under a temporary name,
fsynced and renamed; the last two stay.
Random streams of batches and rollouts follow from the seed and the step; what torch draws besides is saved.
"""

import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd_mcp.engine.context import Context
from opd_mcp.identity.files import file_sha256, publish_directory, write_atomic
from opd_mcp.schemas.reports import CheckpointRecord, LoopState

RECORD_FILE = "checkpoint.json"
MODEL_FILE, OPTIMIZER_FILE, RANDOM_FILE = "model.safetensors", "optimizer.safetensors", "random.safetensors"
PREFIX, BUILDING_PREFIX, DAMAGED_PREFIX = "step-", ".building-", "damaged-"
KEPT = 2
# by time: at least this many times a checkpoint's own cost lies between two of them
COST_FACTOR = 25.0


@dataclass
class Checkpoints:
    """The checkpoints of one training stage: restored when it begins, saved in a thread while it runs.

    As a context manager it waits for the last save on the way out. `save` raises what an earlier save failed with.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    fingerprint: str
    context: Context
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _pending: Future[float] | None = None
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def restored(self) -> LoopState | None:
        """The state of the newest intact checkpoint, put into model and optimizer; None where there is none.

        A damaged checkpoint is named in an alert and set aside, and the one before it is used.
        """
        directory = self.context.checkpoints
        if directory is None or not directory.is_dir():
            return None
        self._remove_leftovers(directory)
        for path in reversed(saved_checkpoints(directory)):
            problem = self._problem(path)
            if problem is None:
                return self._restore(path)
            self._set_aside(path, problem)
        return None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint should be written after this many steps."""
        recipe = self.context.checkpoint
        if self.context.checkpoints is None:
            return False
        if recipe.steps is not None:
            return step % recipe.steps == 0
        if self._pending is not None:
            if not self._pending.done():
                return False
            self._settle()
        return time.monotonic() - self._last >= max(recipe.seconds, COST_FACTOR * self._cost)

    def save(self, state: LoopState, *, wait: bool = False) -> None:
        """Copy everything now and write it while training continues; with `wait`, write it before this returns."""
        self._settle()
        directory = self.context.checkpoints
        if directory is None or (directory / name_of(state.step)).is_dir():
            return
        started = time.monotonic()
        tensors = {
            MODEL_FILE: _weights(self.model),
            OPTIMIZER_FILE: _moments(self.optimizer),
            RANDOM_FILE: random_states(),
        }
        copies = {file: {name: copied(part) for name, part in parts.items()} for file, parts in tensors.items()}
        record = self._record(state, self.model.device)
        self._pending = self._thread.submit(_write, directory, record, copies, started, self.context.check_fence)
        self._last = time.monotonic()
        if wait:
            self._settle()

    def _record(self, state: LoopState, device: torch.device) -> CheckpointRecord:
        """The record of a checkpoint whose files are still to be written; the journal before it is durable."""
        return CheckpointRecord(
            fingerprint=self.fingerprint,
            state=state,
            journal_position=self.context.reporter.position(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            device=device.type,
            files={},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self._settle()

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._cost = pending.result()

    def _remove_leftovers(self, directory: Path) -> None:
        for leftover in list(directory.glob(f"{BUILDING_PREFIX}*")):
            # What was listed before this is an earlier attempt's; what a later one builds is not in the list.
            self.context.check_fence()
            shutil.rmtree(leftover)

    def _set_aside(self, path: Path, problem: str) -> None:
        self.context.check_fence()
        path.rename(path.with_name(f"{DAMAGED_PREFIX}{path.name}-{secrets.token_hex(3)}"))
        self.context.reporter.alert(
            "checkpoint_damaged", f"Checkpoint {path.name} is not used: {problem}. The one before it is, if any."
        )

    def _problem(self, path: Path) -> str | None:
        try:
            record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
        except (OSError, ValidationError):
            return f"{RECORD_FILE} is missing or not what was written"
        for name in (MODEL_FILE, OPTIMIZER_FILE, RANDOM_FILE):
            if not (path / name).is_file() or file_sha256(path / name) != record.files.get(name):
                return f"{name} is missing or not what was written"
        return None if record.fingerprint == self.fingerprint else "it belongs to other settings or another model"

    def _restore(self, path: Path) -> LoopState:
        record = CheckpointRecord.from_json((path / RECORD_FILE).read_bytes())
        weights = load_file(path / MODEL_FILE)
        with torch.no_grad():
            for name, tensor in _weights(self.model).items():
                tensor.copy_(weights[name])
        _restore_moments(self.optimizer, load_file(path / OPTIMIZER_FILE))
        restore_random_states(load_file(path / RANDOM_FILE))
        self._tell_differences(record, {"device": (record.device, self.model.device.type)})
        self.context.reporter.resumed(record.state.step)
        return record.state

    def _tell_differences(self, record: CheckpointRecord, more: dict[str, tuple[Any, Any]]) -> None:
        """Alert where bits change: with other threads, another torch, or `more`, which was so and is so now."""
        now = {"threads": (record.threads, torch.get_num_threads()), "torch": (record.torch, torch.__version__)} | more
        other = [name for name, (before, after) in now.items() if before != after]
        if other:
            self.context.reporter.alert(
                "resumed_elsewhere",
                f"The checkpoint was written with another {' and another '.join(other)}: what follows is sound, but "
                "not to the bit what an uninterrupted run would have given.",
            )


def name_of(step: int) -> str:
    """The name of the directory of the checkpoint after this many steps."""
    return f"{PREFIX}{step:08d}"


def saved_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a training stage, oldest first."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.is_dir())


def _write(
    directory: Path,
    record: CheckpointRecord,
    files: dict[str, dict[str, Tensor]],
    started: float,
    check_fence: Callable[[], None],
) -> float:
    """The seconds that the checkpoint took since `started`; raises what `check_fence` does, and then writes nothing.

    The process may be suspended here for hours, and another one may have taken its place when it continues.
    """
    check_fence()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    building = directory / f"{BUILDING_PREFIX}{secrets.token_hex(6)}"
    building.mkdir(mode=0o700)
    try:
        for name, tensors in files.items():
            save_file(tensors, building / name)
        sealed = record.model_copy(update={"files": {name: file_sha256(building / name) for name in files}}).sealed()
        write_atomic(building / RECORD_FILE, sealed.to_json())
        publish_directory(building, directory / name_of(record.state.step), check_fence)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        check_fence()  # the next owner has removed what was being built: that, not the missing file, is the cause
        raise
    for old in saved_checkpoints(directory)[:-KEPT]:
        check_fence()
        shutil.rmtree(old)
    return time.monotonic() - started


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What training changes: with an adapter that alone, else all parameters, and the buffers."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if len(trained) < sum(1 for _ in model.parameters()):
        return trained
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `number.name`; all of AdamW's is tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entries in state.items() for name, value in entries.items()}


def leave_moments(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Write the optimizer's state for the stretch of training that goes on with the saved weights.

    What a narrow weight lacks of its master is left out: the weights are saved as their masters.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_file({name: copied(part) for name, part in _moments(optimizer).items() if not name.endswith(".low")}, file)


def restore_moments(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Go on with the state that `leave_moments` wrote, for the same weights in a new process."""
    _restore_moments(optimizer, _moments(optimizer) | load_file(file))


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def random_states() -> dict[str, Tensor]:
    """The states of torch's own random streams by device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Continue the streams from these states."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def copied(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
