"""The teacher cache as one memory-mapped file: decoded once, checked at each opening, made again when it is stale.

Layout: 4096 bytes of header (magic, length and crc32 of a JSON text, the text), then the arrays, each at a multiple of
64 bytes. The JSON names the manifest's sha256, the crc32 of all that follows, and each array's place.
Reading it takes numpy alone, so training never waits for Parquet after the first time.
"""

import hashlib
import json
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.cache.shards import read_shard, read_shards
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.files import fsync_directory
from opd_mcp.identity.lineage import MANIFEST_FILE, read_manifest
from opd_mcp.schemas.cache import CacheManifest

FLAT_FILE = "flat.bin"
MAGIC = b"OPDFLAT1"
HEADER_BYTES = 4096
ALIGNMENT = 64
CRC_BYTES = 1 << 24
DTYPES = {"prompt_ids": "<i4", "prompt_offsets": "<i8", "response_ids": "<i4", "response_offsets": "<i8"}
DOMAINS = "domains"
"""The place of each row's domain among those that the header names."""
COLUMN_DTYPES = {"teacher_logprobs": "<f4", "behaviour_logprobs": "<f4", "topk_ids": "<i4", "topk_logprobs": "<f4"}


class FlatProblem(Exception):
    """Why a flat file cannot be used as it is; it is derived, so the answer is to make it again."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def open_flat(cache: Path) -> Sequences:
    """The rows of a cache out of its flat file, which is made first where it is missing, stale or damaged.

    Where the directory cannot be written the rows are decoded into memory. Raises IntegrityError `damaged_file` for a
    damaged shard or manifest.
    """
    try:
        return read_flat(cache)
    except FlatProblem:
        pass
    try:
        write_flat(cache)
    except PermissionError:
        return read_shards(cache, read_manifest(cache).shards)
    return read_flat(cache)


def read_flat(cache: Path) -> Sequences:
    """The rows as read-only maps without prompts' ids and finish reasons, each byte checked; raises FlatProblem."""
    file = cache / FLAT_FILE
    header = _header(file)
    if header["manifest"] != hashlib.sha256((cache / MANIFEST_FILE).read_bytes()).hexdigest():
        raise FlatProblem("it was made from another manifest")
    if _body_crc(file) != header["crc32"]:
        raise FlatProblem("its content does not match its CRC")
    arrays = {}
    for entry in header["arrays"]:
        shape = tuple(entry["shape"])
        mapped = np.memmap(file, dtype=entry["dtype"], mode="r", offset=entry["offset"], shape=shape)
        arrays[entry["name"]] = mapped.view(np.ndarray)  # slicing a memmap itself costs twice the copy
    columns = {name: arrays[name] for name in COLUMN_DTYPES if name in arrays}
    names = header.get(DOMAINS, [])
    return Sequences(
        arrays["prompt_ids"],
        arrays["prompt_offsets"],
        arrays["response_ids"],
        arrays["response_offsets"],
        columns,
        domains=[names[place] for place in arrays[DOMAINS].tolist()] if names else (),
    )


def write_flat(cache: Path) -> Path:
    """Decode the shards of a cache, one at a time, into its flat file; raises IntegrityError, PermissionError."""
    manifest = read_manifest(cache)
    file = cache / FLAT_FILE
    partial = cache / f".{FLAT_FILE}.{secrets.token_hex(6)}.tmp"
    arrays, size = _plan(manifest)
    try:
        with partial.open("w+b") as out:
            _allocate(out.fileno(), size)
            maps: dict[str, NDArray[Any]] = {
                entry["name"]: np.memmap(
                    out, dtype=entry["dtype"], mode="r+", offset=entry["offset"], shape=tuple(entry["shape"])
                )
                for entry in arrays
            }
            names = _fill(maps, cache, manifest)
            del maps  # unmapped, so that reading the file sees what was written
            source = hashlib.sha256((cache / MANIFEST_FILE).read_bytes()).hexdigest()
            out.seek(0)
            header = {"manifest": source, "crc32": _body_crc(partial), "arrays": arrays}
            out.write(_header_bytes(header | ({DOMAINS: names} if names else {})))
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(cache)
    return file


def _allocate(descriptor: int, size: int) -> None:
    """Make the file so long with all its blocks on the disk: a hole that cannot be filled would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        block = bytes(CRC_BYTES)
        for start in range(0, size, CRC_BYTES):
            os.pwrite(descriptor, block[: min(CRC_BYTES, size - start)], start)


def _plan(manifest: CacheManifest) -> tuple[list[dict[str, Any]], int]:
    rows, tokens = manifest.rows, manifest.tokens
    prompt_tokens = sum(shard.prompt_tokens for shard in manifest.shards)
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_ids": (prompt_tokens,),
        "prompt_offsets": (rows + 1,),
        "response_ids": (tokens,),
        "response_offsets": (rows + 1,),
        "teacher_logprobs": (tokens,),
    }
    if manifest.has_behaviour:
        shapes["behaviour_logprobs"] = (tokens,)
    if manifest.topk:
        shapes |= {"topk_ids": (tokens, manifest.topk), "topk_logprobs": (tokens, manifest.topk)}
    if manifest.domains:
        shapes[DOMAINS] = (rows,)
    arrays, place = [], HEADER_BYTES
    for name, shape in shapes.items():
        dtype = np.dtype((DTYPES | COLUMN_DTYPES | {DOMAINS: "<i4"})[name])
        arrays.append({"name": name, "dtype": dtype.str, "shape": list(shape), "offset": place})
        place += -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return arrays, place


def _fill(maps: dict[str, NDArray[Any]], cache: Path, manifest: CacheManifest) -> list[str]:
    """Write the arrays; the names of the domains."""
    row = prompts = responses = 0
    names = sorted(manifest.domains or ())
    places = {name: place for place, name in enumerate(names)}
    for shard in manifest.shards:
        part = read_shard(cache / shard.file, sha256=shard.sha256)
        count, prompt_count, response_count = len(part), len(part.prompt_ids), len(part.response_ids)
        maps["prompt_ids"][prompts : prompts + prompt_count] = part.prompt_ids
        maps["response_ids"][responses : responses + response_count] = part.response_ids
        maps["prompt_offsets"][row : row + count + 1] = part.prompt_offsets + prompts
        maps["response_offsets"][row : row + count + 1] = part.response_offsets + responses
        for name in COLUMN_DTYPES.keys() & maps.keys():
            maps[name][responses : responses + response_count] = part.columns[name]
        if names:
            maps[DOMAINS][row : row + count] = [places[name] for name in part.domains]
        row, prompts, responses = row + count, prompts + prompt_count, responses + response_count
    return names


def _header_bytes(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    head = MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text
    assert len(head) <= HEADER_BYTES, "a handful of arrays fits"
    return head.ljust(HEADER_BYTES, b"\0")


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as source:
            head = source.read(HEADER_BYTES)
    except OSError as error:
        raise FlatProblem("there is none") from error
    if len(head) < HEADER_BYTES or head[:8] != MAGIC:
        raise FlatProblem("its header is not one")
    length, crc = struct.unpack_from("<II", head, 8)
    text = head[16 : 16 + length]
    if zlib.crc32(text) != crc or any(head[16 + length :]):
        raise FlatProblem("its header does not match its CRC")
    found: dict[str, Any] = json.loads(text)
    return found


def _body_crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as source:
        source.seek(HEADER_BYTES)
        while chunk := source.read(CRC_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
