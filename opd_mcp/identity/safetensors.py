"""Safetensors files read by their headers: which tensors there are, and hashes of their bytes, without torch."""

import hashlib
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.identity.files import CHUNK_BYTES, parsed_object, read_json_object
from opd_mcp.schemas.errors import IntegrityError, PathError

INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_HEADER_BYTES = 64 << 20
# The largest known models have some 150,000 tensors in all their files together.
MAX_TENSORS = 1 << 18
META = "__metadata__"
MAX_DIMENSIONS = 16
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 64
# Tensors up to this size are hashed whole: norms, biases and everything in small models.
WHOLE_TENSOR_BYTES = 1 << 16
UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack"}
DTYPE_BYTES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 1),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 2),
    **dict.fromkeys(["I32", "U32", "F32"], 4),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 8),
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes are: [begin, end) in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        return self.end - self.begin


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: `model.safetensors`, or the index's, or all there are.

    Raises PathError `unsafe_weights` when there are only pickled weights, `not_a_model` when there are none;
    IntegrityError `damaged_file` when the index names a file that is missing or elsewhere.
    """
    # The order in which the weights are looked for when the model is loaded: what is hashed is what is loaded.
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    found = sorted(p for p in directory.glob("*.safetensors") if p.is_file() and not p.name.startswith("."))
    if found:
        return found
    unsafe = sorted(p.name for p in directory.iterdir() if p.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise PathError(
            "unsafe_weights",
            f"The weights are in files that can run code when loaded, refused unread: {', '.join(unsafe[:5])}.",
            value=directory,
            fix="Save the model as safetensors (model.save_pretrained(DIR)) and give that directory.",
        )
    raise PathError(
        "not_a_model",
        "This directory has no *.safetensors file.",
        value=directory,
        fix="Give a directory with config.json, tokenizer.json and safetensors weights.",
    )


def read_tensors(directory: Path) -> list[Tensor]:
    """All tensors of a model, sorted by name; raises as `weight_files` does, and `damaged_file` for a bad header."""
    by_name: dict[str, Tensor] = {}
    for file in weight_files(directory):
        for tensor in _file_tensors(file):
            if tensor.name in by_name:
                raise _damaged(file, f"tensor {tensor.name!r} is also in {by_name[tensor.name].file.name}")
            by_name[tensor.name] = tensor
        if len(by_name) > MAX_TENSORS:
            raise _too_many(file)
    return [by_name[name] for name in sorted(by_name)]


def sampled_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and evenly spaced blocks of the tensor's bytes, its first and last among them."""
    if tensor.bytes <= WHOLE_TENSOR_BYTES:
        return full_digest(tensor)
    digest = _started_digest(tensor)
    last = tensor.bytes - BLOCK_BYTES
    with tensor.file.open("rb") as file:
        for block in range(SAMPLED_BLOCKS):
            offset = last * block // (SAMPLED_BLOCKS - 1)
            digest.update(os.pread(file.fileno(), BLOCK_BYTES, tensor.begin + offset))
    return digest.hexdigest()


def full_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and all bytes of a tensor."""
    digest = _started_digest(tensor)
    if not tensor.bytes:
        return digest.hexdigest()
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        left = tensor.bytes
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _started_digest(tensor: Tensor) -> "hashlib._Hash":
    return hashlib.sha256(f"{tensor.dtype!a}{list(tensor.shape)}".encode())


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "there is no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _damaged(index, f"{name!r} is not the name of a safetensors file next to it")
        if not (index.parent / name).is_file():
            raise _damaged(index, f"the shard {name} is missing")
    return [index.parent / name for name in names]


def file_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file says about itself; raises IntegrityError `damaged_file`."""
    given = _header(path)[0].get(META)
    return {name: value for name, value in given.items() if isinstance(value, str)} if isinstance(given, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header and where its tensors' bytes begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, "the header's length is wrong")
        text = file.read(length)
    if text.count(b"{") > MAX_TENSORS + 2:  # an object each, counted before any is built
        raise _too_many(path)
    return parsed_object(text, path), 8 + length


def _file_tensors(path: Path) -> Iterator[Tensor]:
    size = path.stat().st_size
    header, end = _header(path)
    tensors = [_tensor(path, name, entry, data_begin=end, size=size) for name, entry in header.items() if name != META]
    # Without overlaps, hashing every tensor reads the file once, however many there are.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < end:
            raise _damaged(path, f"tensor {tensor.name!r} overlaps with another")
        end = tensor.end
    yield from tensors


def _tensor(path: Path, name: str, entry: Any, *, data_begin: int, size: int) -> Tensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"the entry of tensor {name!r} is wrong")
    tensor = Tensor(name, dtype, shape, path, data_begin + offsets[0], data_begin + offsets[1])
    if tensor.end > size:
        raise _damaged(path, f"the file ends before tensor {name!r} does")
    if tensor.bytes < 0 or (dtype in DTYPE_BYTES and tensor.bytes != tensor.elements * DTYPE_BYTES[dtype]):
        raise _damaged(path, f"the size of tensor {name!r} does not fit its shape")
    return tensor


def _counts(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    if all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return tuple(value)
    return None


def _too_many(path: Path) -> IntegrityError:
    return _damaged(path, f"there are more than {MAX_TENSORS} tensors")


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "damaged_file", f"{path.name}: {why}.", value=path, fix="Copy or download the model directory again."
    )
