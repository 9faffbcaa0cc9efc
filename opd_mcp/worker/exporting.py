"""Where a run exports to: a hidden folder next to the destination, which gets its name once everything is on disk."""

import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.devices.environment import engine_environment
from opd_mcp.devices.hardware import free_disk
from opd_mcp.identity.files import file_sha256, publish_directory, read_json_object, write_atomic
from opd_mcp.identity.lineage import LINEAGE_FILE
from opd_mcp.planning.costs.run_workload import exported_bytes
from opd_mcp.schemas.errors import PathError, ResourceError, RunError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.runs import RunInputs
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import destination_exists

logger = logging.getLogger(__name__)
WAIT_SECONDS, LOGGED_LINES = 0.2, 30
MARK_FILE = "export.json"
"""In the run's directory: the hash of the lineage of what it is about to give its name."""


@dataclass(frozen=True)
class Exporting:
    """The export of one run; `directory` is the run's."""

    inputs: RunInputs
    directory: Path
    artifacts: ArtifactStore
    journal: JournalWriter

    @property
    def destination(self) -> Path:
        """The directory that the run makes."""
        assert self.inputs.export is not None, "an export has a destination"
        return Path(self.inputs.export.destination)

    def is_done(self) -> bool:
        """Whether an earlier attempt of this run gave the export its name, and died before it could say so."""
        mark, lineage = self.directory / MARK_FILE, self.destination / LINEAGE_FILE
        if not mark.is_file() or not lineage.is_file():
            return False
        return bool(read_json_object(mark).get("lineage_sha256") == file_sha256(lineage))

    def building(self) -> Path:
        """A new directory of the destination's name in a hidden folder of this attempt, on the same file system.

        What earlier attempts left there is removed. Raises PathError `outside_roots` where the way to the destination
        has become a link, `destination_exists`; ResourceError `not_enough_disk`.
        """
        final = self.destination
        if final.parent.resolve() != final.parent:
            raise PathError(
                "outside_roots",
                "The folder of the destination has become a link since the run was started.",
                value=final,
                fix="Start the export again.",
            )
        if final.exists():
            raise destination_exists(final)
        require_export_room(self.inputs, final.parent, str(final))
        for left in final.parent.glob(f"{self._hidden_prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        named = final.parent / f"{self._hidden_prefix}{self.journal.attempt}" / final.name
        named.mkdir(parents=True, mode=0o700)
        return named

    def published(self, building: Path) -> None:
        """Sign the lineage if this workspace wrote the model's, and give the directory its name.

        Raises PathError `destination_exists`.
        """
        if self.inputs.model and self.inputs.model.path and self.artifacts.made_here(Path(self.inputs.model.path)):
            self.artifacts.key.key.sign(building)
        mark = {"lineage_sha256": file_sha256(building / LINEAGE_FILE)}
        write_atomic(self.directory / MARK_FILE, json.dumps(mark) + "\n")
        try:
            publish_directory(building, self.destination, self.journal.check_fence)
        except FileExistsError as error:
            raise destination_exists(self.destination) from error

    def remove_building(self) -> None:
        """Remove the hidden folder of this attempt."""
        folder = self.destination.parent / f"{self._hidden_prefix}{self.journal.attempt}"
        shutil.rmtree(folder, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """What the run's result says of the export."""
        assert self.inputs.export is not None, "an export has a destination"
        written = {"format": self.inputs.export.format, "bytes": tree_bytes(self.destination)}
        return {"paths": {"export": str(self.destination)}, "export": written}

    @property
    def _hidden_prefix(self) -> str:
        return f".{self.destination.name}.{self.directory.name}-"


@dataclass(frozen=True)
class GgufConverter:
    """llama.cpp's converter as the settings name it; `should_stop` ends it."""

    script: Path
    python: Path
    should_stop: Callable[[], bool]

    def __call__(self, model: Path, file: Path) -> None:
        """Write the file of the model in a directory, in the dtype of its weights.

        The converter inherits no secret and is offline. Raises ResourceError `child_failed` with its last words,
        RunError `run_cancelled`.
        """
        command = [str(self.python), str(self.script), str(model), "--outfile", str(file), "--outtype", "auto"]
        environment = engine_environment(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with tempfile.TemporaryFile() as said:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environment
                )
                while (status := _status(child)) is None:
                    if self.should_stop():
                        child.kill()
                        child.wait()
                        raise RunError("run_cancelled", "The run was asked to stop.", fix="Resume the run to go on.")
                said.seek(0)
                words = said.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            status, words = 1, [str(error)]
        logger.info("%s", "\n".join(words[-LOGGED_LINES:]))
        if status != 0 or not file.is_file():
            raise ResourceError(
                "child_failed",
                f"llama.cpp's converter ended with status {status}: {' '.join(words[-2:])[:400]}",
                value=str(self.script),
                fix="It must know the model's architecture and tokenizer, and its Python must have its requirements "
                "(gguf, torch, transformers); then resume the run. Or export with format='input'.",
                call=resume_call(),
            )


def _status(child: "subprocess.Popen[bytes]") -> int | None:
    try:
        return child.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def require_export_room(inputs: RunInputs, folder: Path, destination: str) -> None:
    """Raise ResourceError `not_enough_disk` where an export does not fit on the disk of the folder it is built in."""
    needed, free = exported_bytes(inputs), free_disk(folder)
    if needed > free:
        raise ResourceError(
            "not_enough_disk",
            f"The export takes up to {byte_size(needed)}; the disk that it is built on has {byte_size(free)} free.",
            value=destination,
            fix="Free disk space there, then resume the run; or export elsewhere.",
            call=resume_call(),
        )
