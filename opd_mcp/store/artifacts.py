"""Artifacts: finished results in directories that never change, found by id or by the key of what made them."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field, ValidationError

from opd_mcp.identity.files import file_sha256, publish_directory, write_atomic
from opd_mcp.identity.lineage import LINEAGE_FILE, read_lineage
from opd_mcp.identity.signatures import SIGNATURE_FILE
from opd_mcp.schemas.base import Record, first_problem, unchanged
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError, nearest
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.store.files import tree_bytes, tree_sha256
from opd_mcp.store.index import Index, IndexedArtifact
from opd_mcp.store.journal import utc_now
from opd_mcp.store.keys import WorkspaceKey, workspace_key
from opd_mcp.store.workspace import ARTIFACT_KINDS, Workspace, is_id

ARTIFACT_FILE = "artifact.json"
BUILDING_PREFIX = ".building-"
LOCK_SUFFIX = ".lock"
LOCK_POLL_SECONDS = 0.2
# Its readers check it and rebuild it.
DERIVED_FILES = frozenset({"flat.bin"})


class ArtifactRecord(Record):
    """`artifact.json`; `bytes` and `files` are those of all other files."""

    upgrades = (unchanged,)  # 2: sealed, with the hashes of the files
    artifact_id: str
    kind: ArtifactKind
    key: str
    run_id: str | None = None
    created_at: str
    bytes: int
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of each other file")


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

    @cached_property
    def key(self) -> WorkspaceKey:
        """What signs the lineages that are published here."""
        return workspace_key(self.workspace)

    def made_here(self, directory: Path) -> bool:
        """Whether this workspace wrote a directory's lineage, also if the directory was moved.

        The key's signature says so. An artifact that was published before the workspace had a key has none; it counts
        where it was published, as its record has the lineage's hash: who can write there can read the key as well.
        """
        if (directory / SIGNATURE_FILE).exists():
            return self.key.key.signed(directory)
        place = directory.resolve()
        if place.parent.parent != self.workspace.artifacts or not (place / ARTIFACT_FILE).is_file():
            return False
        record, lineage = read_artifact(place).record, place / LINEAGE_FILE
        return (
            record.artifact_id == place.name
            and record.created_at < self.key.created_at
            and lineage.is_file()
            and record.files.get(LINEAGE_FILE) == file_sha256(lineage)
        )

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

        The name identifies the content, so a later process finds the same build again. Waits while another process
        holds it.
        """
        directory = self.workspace.artifacts_of(kind) / (BUILDING_PREFIX + name)
        lock = build_lock(directory)
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
            if not directory.exists():  # published or abandoned: the build is over
                lock.unlink(missing_ok=True)
            os.close(descriptor)

    def publish(
        self,
        kind: ArtifactKind,
        building: Path,
        artifact_id: str,
        key: str,
        run_id: str | None = None,
        check_fence: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """Turn a finished building directory into an artifact, its lineage signed; `check_fence` raises if it must not.

        When another process published the same id with the same key first, its directory is kept and this one is
        removed. Raises IntegrityError `artifact_exists` when that id belongs to something else.
        """
        if not is_id(artifact_id):
            raise ValueError(f"not an id: {artifact_id!r}")
        final = self.workspace.artifacts_of(kind) / artifact_id
        (building / ARTIFACT_FILE).unlink(missing_ok=True)  # of an earlier attempt that died just before its rename
        self.key.key.sign(building)
        record = ArtifactRecord(
            artifact_id=artifact_id,
            kind=kind,
            key=key,
            run_id=run_id,
            created_at=utc_now(),
            bytes=tree_bytes(building),
            files=tree_sha256(building),
        ).sealed()
        write_atomic(building / ARTIFACT_FILE, record.to_json(indent=2) + "\n")
        try:
            publish_directory(building, final, check_fence)
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
        """The oldest artifact of a kind with this key; None when there is none on the disk."""
        return next(iter(self.list(kind, key=key)), None)

    def made_by(self, keys: Collection[str]) -> dict[str, str]:
        """The ids of readable artifacts by key, the oldest one per key; one query of the index."""
        found: dict[str, str] = {}
        for row in self.index.artifacts_of_keys(keys):
            path = self.workspace.artifacts_of(row.kind) / row.artifact_id
            with suppress(IntegrityError):
                if row.key not in found and (path / ARTIFACT_FILE).is_file() and read_artifact(path):
                    found[row.key] = row.artifact_id
        return found

    def find_made(self, kind: ArtifactKind, artifact_id: str, key: str) -> Artifact | None:
        """The artifact with this key, even if its maker died before it was indexed.

        Raises IntegrityError `damaged_file` when its record cannot be read.
        """
        found = self.find_by_key(kind, key)
        if found is None and (self.workspace.artifacts_of(kind) / artifact_id / ARTIFACT_FILE).is_file():
            found = read_artifact(self.workspace.artifacts_of(kind) / artifact_id)
            if found.record.key != key:
                return None
            self.index.add_artifact(artifact_row(found.record))
        return found

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
        """Artifacts, oldest first; index rows whose directory is gone are removed.

        One with a damaged record is skipped, so that it does not hide the others; `damaged` names it.
        """
        found = []
        for row in self.index.artifacts(kind=kind, key=key):
            path = self.workspace.artifacts_of(row.kind) / row.artifact_id
            if not (path / ARTIFACT_FILE).is_file():
                self.index.remove_artifact(row.artifact_id)
                continue
            with suppress(IntegrityError):
                found.append(read_artifact(path))
        return found

    def census(self, kind: ArtifactKind | None = None) -> tuple[int, Sequence[str]]:
        """How many artifacts there are, and the ids that a rebuilt index left out since their record cannot be read.

        Index rows whose directory is gone are removed.
        """
        indexed = self.index.artifact_ids(kind)
        kinds = ARTIFACT_KINDS if kind is None else (kind,)
        # After the index, in which an artifact stands only once its directory is there.
        here = {name: kind for kind in kinds for name in os.listdir(self.workspace.artifacts_of(kind))}
        for artifact_id in indexed - here.keys():
            self.index.remove_artifact(artifact_id)
        unknown = [self.workspace.artifacts_of(here[name]) / name for name in here.keys() - indexed if is_id(name)]
        return len(indexed & here.keys()), sorted(path.name for path in unknown if _is_damaged(path))

    def damaged(self) -> Iterator[IntegrityError]:
        """What is wrong with artifacts whose record or lineage cannot be read."""
        for path in artifact_directories(self.workspace):
            try:
                read_artifact(path)
                read_lineage(path)
            except IntegrityError as problem:
                yield problem


def build_lock(directory: Path) -> Path:
    """The lock file of a building directory; it may exist before the directory does, and after."""
    return directory.with_name(directory.name + LOCK_SUFFIX)


@contextmanager
def unused_build(directory: Path) -> Iterator[bool]:
    """Whether no process holds a building directory; inside the block no process can resume it.

    The lock file stays as it was; a caller that removes the directory removes the lock file too, inside the block.
    """
    lock = build_lock(directory)
    there = lock.exists()
    descriptor = _locked(lock)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if not there:
                lock.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(lock: Path) -> int | None:
    """A descriptor that holds the lock, or None when another process does; the kernel frees it at the process's end."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # held, or removed by its last holder in between
    os.close(descriptor)
    return None


def _is_damaged(path: Path) -> bool:
    try:
        read_artifact(path)
    except IntegrityError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        pass  # no artifact, or removed meanwhile
    return False


def read_artifact(path: Path) -> Artifact:
    """The artifact in a directory; raises IntegrityError `damaged_file`."""
    file = path / ARTIFACT_FILE
    try:
        return Artifact(ArtifactRecord.from_json(file.read_bytes()), path)
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file",
            f"artifact.json cannot be used ({first_problem(error)}).",
            value=file,
            fix="Remove this artifact's directory; a run that needs it makes it again.",
        ) from error


def require_intact(artifact: Artifact) -> None:
    """Raise IntegrityError `damaged_file` naming the first file of an artifact that is not what was published."""
    for name, sha256 in artifact.record.files.items():
        file = artifact.path / name
        if name not in DERIVED_FILES and not (file.is_file() and file_sha256(file) == sha256):
            raise IntegrityError(
                "damaged_file",
                f"{name} of {artifact.artifact_id} is missing or not what was written.",
                value=file,
                fix="Restore the file from a copy; or move this directory away, and a resumed run makes it again.",
            )


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
