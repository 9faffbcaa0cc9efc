"""Reading and writing the manifest, and the rollouts it vouches for."""

from pathlib import Path

from pydantic import ValidationError

from opd_mcp.engine.cache.shards import damaged, read_shards
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import PathError

MANIFEST_FILE = "manifest.json"


def write_manifest(directory: Path, manifest: CacheManifest) -> None:
    """Write the manifest; it stands only beside complete shards."""
    write_atomic(directory / MANIFEST_FILE, manifest.sealed().to_json(indent=2))


def read_manifest(directory: Path) -> CacheManifest:
    """The manifest of a teacher cache.

    Raises PathError `not_a_cache` without one, IntegrityError `damaged_file` for one that does not parse.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise PathError(
            "not_a_cache",
            "This directory has no teacher cache's manifest.json.",
            value=directory,
            fix="Give a cache id, or the directory of a teacher cache.",
        )
    try:
        return CacheManifest.from_json(path.read_bytes())
    except ValidationError as error:
        raise damaged(path, first_problem(error)) from error


def read_cache(directory: Path) -> tuple[CacheManifest, Sequences]:
    """Manifest and all rows, checked against the shards' hashes and the rows' CRCs."""
    manifest = read_manifest(directory)
    return manifest, read_shards(directory, manifest.shards)
