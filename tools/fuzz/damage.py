"""Damage for files: flips, cuts, repeats, and JSON values of other types, sizes and depths; all from one generator."""

import copy
import io
import json
import random
import struct
import zlib
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_mcp.schemas.base import content_hash

ODD_BYTES = [
    b"\xff\xfe",
    b"\x00" * 9,
    b"\xc3(",
    b"{" * 5000,
    b"[" * 100_000,
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"\n\n",
    b"\\ud800",
]
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\ud800", "a\0b",
    "../x", "/etc/passwd", [], {}, [[]], [None], {"a": 1}, [0] * 1000, ["x"] * 50, "running",
    "2026-01-01T00:00:00.000Z",
]  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """The bytes with one to four faults of any kind."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 4, 64, 4096)), len(data) - place)
        match rng.randrange(6):
            case 0 if data:
                data[place - 1] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
            case 4:
                data[place : place + length] = rng.randbytes(length)
            case _:
                data[place:place] = rng.choice(ODD_BYTES)
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with a few entries replaced, missing, or doubled."""
    root = [json.loads(json.dumps(value))]
    for _ in range(rng.randint(1, 3)):
        places = list(_places(root))
        holder, key = rng.choice(places[1:] or places)
        match rng.randrange(5):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 2:
                other, name = rng.choice(places)
                holder[key] = json.loads(_text(other[name]))
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return root[0]


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file, damaged in its bytes or in its values."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, content)
    return _text(damaged_value(rng, json.loads(content))).encode("utf-8", "surrogatepass")


def damaged_lines(rng: random.Random, content: bytes) -> bytes:
    """A JSONL file, damaged in its bytes or in the values of some lines."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, content)
    lines = content.splitlines()
    for place in rng.sample(range(len(lines)), rng.randint(1, 3)):
        lines[place] = damaged_json(rng, lines[place])
    return b"\n".join(lines) + b"\n"


def damaged_journal(rng: random.Random, content: bytes) -> bytes:
    """A journal whose damaged lines mostly have a matching checksum."""
    if rng.random() < 0.2:
        return damaged_bytes(rng, content)
    lines = content.splitlines()
    for place in rng.sample(range(len(lines)), rng.randint(1, 3)):
        record = json.loads(lines[place])
        record.pop("crc", None)
        keep = rng.choice(("data", None))
        record = {**record, keep: damaged_value(rng, record[keep])} if keep else damaged_value(rng, record)
        body = _text(record).encode("utf-8", "surrogatepass")
        lines[place] = body[:-1] + b',"crc":"%08x"}' % zlib.crc32(body) if isinstance(record, dict) else body
    return b"\n".join(lines) + b"\n"


def damaged_seal(rng: random.Random, content: bytes) -> bytes:
    """A record with `self_sha256` of its damaged content."""
    value = damaged_value(rng, json.loads(content))
    if isinstance(value, dict) and rng.random() < 0.7:
        with suppress(ValueError):  # no seal holds a number that is not finite
            value["self_sha256"] = content_hash({**value, "self_sha256": ""})
    return _text(value).encode("utf-8", "surrogatepass")


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file, damaged in its bytes or in the values of its header."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = _text(damaged_value(rng, json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    stated = rng.choice((len(header), len(header), len(header), 0, 2**63, len(content)))
    return struct.pack("<Q", stated) + header + content[8 + length :]


def damaged_table(rng: random.Random, content: bytes) -> bytes:
    """A Parquet file with damaged bytes, or a readable one whose columns are missing or of other types."""
    if rng.random() < 0.3:
        return damaged_bytes(rng, content)
    table = pq.read_table(pa.BufferReader(content))
    columns = {name: table.column(name) for name in table.column_names}
    for name in rng.sample(table.column_names, rng.randint(1, 2)):
        columns[name] = _odd_column(rng, len(table))
        if rng.random() < 0.2:
            del columns[name]
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd", row_group_size=rng.choice((1, 7, 1000)))
    return out.getvalue()


def _odd_column(rng: random.Random, rows: int) -> pa.Array:
    broken = pa.Array.from_buffers(
        pa.string(),
        rows,
        [None, pa.py_buffer(struct.pack(f"<{rows + 1}i", *range(rows + 1))), pa.py_buffer(b"\xff" * rows)],
    )
    same = pa.array(["x" * (2 << 20)])
    return rng.choice(
        (
            broken,
            pa.nulls(rows),
            pa.array([rng.choice((None, -1, 2**62, 3)) for _ in range(rows)], pa.int64()),
            pa.array([rng.choice((float("nan"), float("inf"), 1e308, 0.5)) for _ in range(rows)]),
            pa.array([[1, None, -5]] * rows, pa.list_(pa.int64())),
            pa.array([[2**63] * 3] * rows, pa.list_(pa.uint64())),
            pa.array([[0.5, None]] * rows, pa.large_list(pa.float32())),
            pa.array([["a"]] * rows, pa.list_(pa.string())),
            pa.array([[]] * rows, pa.list_(pa.int32())),
            pa.array([{"role": 1, "content": [None]}] * rows),
            pa.array([[{"role": "user", "content": None}]] * rows),
            pa.array([b"\x80\x04."] * rows, pa.binary()),
            pa.array([2**62] * rows, pa.timestamp("us")),
            pa.array([True] * rows),
            pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), same),
        )
    )


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in found:
        inner = holder[key]
        if isinstance(inner, dict):
            found += [(inner, name) for name in inner]
        elif isinstance(inner, list):
            found += [(inner, index) for index in range(min(len(inner), 50))]
        if len(found) > 400:
            break
    return found


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
