"""`lineage.json`: written with an artifact, read and proven again wherever its directory has been copied."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from opd_mcp.identity.files import bounded_bytes, file_sha256, write_atomic
from opd_mcp.identity.models import ModelFacts, full_weights_hash, inspect_model
from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import IntegrityError, PathError
from opd_mcp.schemas.identity import ArtifactKind, Lineage, ModelIdentity

LINEAGE_FILE = "lineage.json"
MANIFEST_FILE = "manifest.json"
MAX_LINEAGE_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 64 << 20
PROOF_NEEDED: frozenset[ArtifactKind] = frozenset({"model", "responses", "cache"})
# Files of an artifact lie in it or in one folder of it; links are followed no deeper when a reference is checked.
MAX_DEPTH = 3
RESTORE = "Copy the artifact's directory again, or make it anew; remove lineage.json to use it without proof."


def write_lineage(directory: Path, lineage: Lineage) -> None:
    """Write a directory's lineage.json."""
    write_atomic(directory / LINEAGE_FILE, lineage.sealed().to_json(indent=2) + "\n")


def read_lineage(directory: Path) -> Lineage | None:
    """A directory's lineage as written, unproven; None without one. Raises IntegrityError `damaged_file`."""
    file = directory / LINEAGE_FILE
    if not file.is_file():
        return None
    try:
        return Lineage.from_json(bounded_bytes(file, MAX_LINEAGE_BYTES))
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file", f"lineage.json cannot be used ({first_problem(error)}).", value=file, fix=RESTORE
        ) from error


def verified_lineage(
    directory: Path, *, full: bool = False, inspect: Callable[[Path], ModelFacts] = inspect_model
) -> Lineage | None:
    """A directory's lineage, proven against its files now; None without one.

    Data files are compared by sha256; a model by weights, tokenizer, template and special tokens, and with `full`
    by every byte of its weights where the lineage has that hash. `inspect` may be a cache's. Raises IntegrityError
    `lineage_mismatch`, naming the file.
    """
    lineage = read_lineage(directory)
    if lineage is None:
        return None
    if lineage.kind in PROOF_NEEDED and not (lineage.files or lineage.model):
        raise _mismatch(directory / LINEAGE_FILE, "lineage.json names no file and no model that could prove it")
    for name, sha256 in lineage.files.items():
        _require_file(directory, name, sha256)
    if lineage.model is not None:
        _require_model(directory, lineage.model, inspect(directory).identity, full=full)
    return lineage


def file_lineage(file: Path) -> Lineage | None:
    """The lineage next to a data file, proven for that file alone; None where there is none, or it names others only.

    No other file is opened. Raises IntegrityError `lineage_mismatch` or `damaged_file`.
    """
    lineage = read_lineage(file.parent)
    if lineage is None or file.name not in lineage.files:
        return None
    _require_file(file.parent, file.name, lineage.files[file.name])
    return lineage


def read_manifest(path: Path, reference: object = None) -> CacheManifest:
    """The manifest in a cache's directory; raises PathError `not_a_cache`, IntegrityError `damaged_file`."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise PathError(
            "not_a_cache",
            f"This is not a teacher cache: it has no {MANIFEST_FILE}.",
            value=reference or path,
            fix="Give the cache_id that the build of the cache answered.",
        )
    try:
        return CacheManifest.from_json(bounded_bytes(file, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        raise IntegrityError(
            "damaged_file",
            f"{file.name} cannot be read ({first_problem(error)}).",
            value=file,
            fix="Run `opd-mcp cache verify`, then restore the file from a copy or build the cache again.",
        ) from error


def data_hashes(directory: Path, names: list[str]) -> dict[str, str]:
    """`Lineage.files` for the named files of a directory."""
    return {name: file_sha256(directory / name) for name in sorted(names)}


def _require_file(directory: Path, name: str, sha256: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise _mismatch(directory / LINEAGE_FILE, f"lineage.json names a file outside of its directory ({name})")
    if len(parts.parts) > MAX_DEPTH:
        raise _mismatch(directory / LINEAGE_FILE, f"lineage.json names a file that lies too deep ({name})")
    file = directory / parts
    if not os.path.isfile(file):  # unlike Path.is_file, also for a name that is too long
        raise _mismatch(file, f"{name[:200]} is missing")
    if file_sha256(file) != sha256:
        raise _mismatch(file, f"{name} is not the file that the lineage was written for")


def _require_model(directory: Path, written: ModelIdentity, found: ModelIdentity, *, full: bool) -> None:
    names = {
        "weights": "the weights",
        "configuration": "config.json",
        "tokenizer": "tokenizer.json",
        "chat_template": "the chat template",
        "special_tokens": "the special tokens",
        "encoding": "how tokenizer.json makes ids of text",
    }
    differing = written.differences(found)
    for name, what in names.items():
        if name in differing:
            raise _mismatch(directory, f"{what} in this directory changed after lineage.json was written")
    if full and written.weights_full is not None and full_weights_hash(directory) != written.weights_full:
        raise _mismatch(directory, "the weights in this directory changed after lineage.json was written")


def _mismatch(path: Path, why: str) -> IntegrityError:
    return IntegrityError("lineage_mismatch", f"The lineage is not proven: {why}.", value=path, fix=RESTORE)
