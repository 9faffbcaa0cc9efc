"""Artifacts: finished results in directories that never change, found by id or by the key of what made them."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError, nearest
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.store.files import publish_directory, tree_bytes
from opd_mcp.store.ids import is_id
from opd_mcp.store.index import Index, IndexedArtifact
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import ARTIFACT_KINDS, Workspace

ARTIFACT_FILE = "artifact.json"
BUILDING_PREFIX = ".building-"
LOCK_POLL_SECONDS = 0.2


class ArtifactRecord(Schema):
    """`artifact.json`; `bytes` are those of all other files."""

    schema_version: Literal[1] = 1
    artifact_id: str
    kind: ArtifactKind
    key: str
    run_id: str | None = None
    created_at: str
    bytes: int


@dataclass(frozen=True)
class Artifact:
    """An artifact in this workspace: its record and its directory."""

    record: ArtifactRecord
    path: Path

    @property
    def artifact_id(self) -> str:
        """The id."""
        return self.record.artifact_id

    @property
    def kind(self) -> ArtifactKind:
        """The kind."""
        return self.record.kind


class ArtifactStore:
    """The artifacts of a workspace."""

    def __init__(self, workspace: Workspace, index: Index) -> None:
        self.workspace = workspace
        self.index = index

    def new_building_directory(self, kind: ArtifactKind) -> Path:
        """An empty directory for a stage's output, on the file system where `publish` renames it."""
        directory = self.workspace.artifacts_of(kind) / (BUILDING_PREFIX + secrets.token_hex(6))
        directory.mkdir(mode=0o700)
        return directory

    @contextmanager
    def resumable_directory(
        self, kind: ArtifactKind, name: str, should_stop: Callable[[], bool]
    ) -> Iterator[Path | None]:
        """A building directory that outlives its process, held by one process at a time; None when asked to stop.

        It is found again under its name, so the name holds everything that decides its content. Waits while another
        process builds it.
        """
        directory = self.workspace.artifacts_of(kind) / (BUILDING_PREFIX + name)
        lock = directory.with_name(f"{directory.name}.lock")
        descriptor = None
        while descriptor is None and not should_stop():
            descriptor = _locked(lock)
            if descriptor is None:
                time.sleep(LOCK_POLL_SECONDS)
        if descriptor is None:
            yield None
            return
        try:
            directory.mkdir(exist_ok=True, mode=0o700)
            yield directory
        finally:
            if not directory.exists():  # published or given up: nobody will go on with it
                lock.unlink(missing_ok=True)
            os.close(descriptor)

    def publish(
        self,
        kind: ArtifactKind,
        building: Path,
        artifact_id: str,
        key: str,
        run_id: str | None = None,
        require_right: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """Turn a finished building directory into an artifact, durably; `require_right` raises when it must not.

        When another process published the same id with the same key first, its directory is kept and this one is
        removed. Raises IntegrityError `artifact_exists` when that id belongs to something else.
        """
        if not is_id(artifact_id):
            raise ValueError(f"not an id: {artifact_id!r}")
        final = self.workspace.artifacts_of(kind) / artifact_id
        record = ArtifactRecord(
            artifact_id=artifact_id,
            kind=kind,
            key=key,
            run_id=run_id,
            created_at=utc_now(),
            bytes=tree_bytes(building),
        )
        write_atomic(building / ARTIFACT_FILE, record.to_json(indent=2) + "\n")
        require_right()
        try:
            publish_directory(building, final)
        except FileExistsError:
            record = read_artifact(final).record
            if record.key != key:
                raise IntegrityError(
                    "artifact_exists",
                    f"There is another {kind} with this id.",
                    value=artifact_id,
                    fix="Start the run again; it gets a new id.",
                ) from None
            shutil.rmtree(building)
        self.index.add_artifact(artifact_row(record))
        return Artifact(record, final)

    def find_by_key(self, kind: ArtifactKind, key: str) -> Artifact | None:
        """The oldest artifact of a kind that was made by exactly this; None when there is none on the disk."""
        return next(iter(self.list(kind, key=key)), None)

    def find(self, artifact_id: str) -> Artifact | None:
        """The artifact of an id; None when there is none."""
        if is_id(artifact_id):
            for kind in ARTIFACT_KINDS:
                path = self.workspace.artifacts_of(kind) / artifact_id
                if (path / ARTIFACT_FILE).is_file():
                    return read_artifact(path)
        return None

    def get(self, artifact_id: str) -> Artifact:
        """The artifact of an id; raises UnknownIdError `unknown_artifact` with the nearest ids."""
        found = self.find(artifact_id)
        if found is not None:
            return found
        raise UnknownIdError(
            "unknown_artifact",
            "There is no such artifact in this workspace.",
            value=artifact_id,
            nearest=nearest(artifact_id, [row.artifact_id for row in self.index.artifacts()]),
            fix="Give an artifact id as a run's result shows it, or an absolute path.",
        )

    def list(self, kind: ArtifactKind | None = None, *, key: str | None = None) -> list[Artifact]:
        """Artifacts oldest first; rows whose directory is gone are forgotten on the way."""
        found = []
        for row in self.index.artifacts(kind=kind, key=key):
            path = self.workspace.artifacts_of(row.kind) / row.artifact_id
            if (path / ARTIFACT_FILE).is_file():
                found.append(read_artifact(path))
            else:
                self.index.remove_artifact(row.artifact_id)
        return found


def _locked(lock: Path) -> int | None:
    """A descriptor that holds the lock, or None when another process does; the kernel frees it with the process."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # held, or removed by its last holder in between
    os.close(descriptor)
    return None


def read_artifact(path: Path) -> Artifact:
    """The artifact in a directory; raises IntegrityError `damaged_file`."""
    file = path / ARTIFACT_FILE
    try:
        return Artifact(ArtifactRecord.from_json(file.read_bytes()), path)
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file",
            "artifact.json is not a record this version can read.",
            value=file,
            fix="Remove this artifact's directory; a run that needs it makes it anew.",
        ) from error


def artifact_row(record: ArtifactRecord) -> IndexedArtifact:
    """The index row of an artifact's record."""
    return IndexedArtifact(record.artifact_id, record.kind, record.key, record.run_id, record.created_at, record.bytes)


def artifact_directories(workspace: Workspace) -> list[Path]:
    """The directories of all published artifacts."""
    return [
        path
        for kind in ARTIFACT_KINDS
        for path in sorted(workspace.artifacts_of(kind).iterdir())
        if not path.name.startswith(".") and (path / ARTIFACT_FILE).is_file()
    ]
