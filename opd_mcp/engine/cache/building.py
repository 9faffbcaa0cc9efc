"""A building directory that outlives its process: what it is for, and which of its shards are finished.

A shard counts once its note exists; the note is written after the shard. A process that dies in between loses that one
shard, which the next build with the same record draws again, to the bit.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from opd_mcp.engine.cache.shards import damaged, read_shard, write_shard
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record, Schema, first_problem
from opd_mcp.schemas.cache import Shard
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.identity import EngineFacts

BUILD_FILE = "build.json"
NOTE_SUFFIX = ".done.json"
ENGINE = "engine"


class BadRow(Schema):
    """A row that is left out, and why."""

    prompt_id: str
    reason: str


class ShardNote(Record):
    """What a finished shard holds and took; sums over the notes are what the manifest says."""

    shard: Shard
    seconds: float
    clamped: int = 0
    truncated_dropped: int = 0
    truncated_capped: int = 0
    bad_rows: list[BadRow] = Field(default_factory=list)


def open_build(directory: Path, record: dict[str, Any]) -> None:
    """Make the directory ready for a build that `record` fixes, new or resumed.

    Raises IntegrityError `input_changed`, naming what differs, when the directory was begun for another record.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in (*directory.glob(".*.partial"), *directory.glob(".*.tmp")):
        leftover.unlink()
    file, wanted = directory / BUILD_FILE, BuildRecord(record=record)
    if not file.exists():
        write_atomic(file, wanted.sealed().to_json(indent=2))
        return
    begun, now = begun_build(directory), wanted.to_dict()["record"]
    changed = sorted(name for name in begun.keys() | now.keys() if not _same(begun.get(name), now.get(name)))
    if changed:
        raise IntegrityError(
            "input_changed",
            f"This build was begun with another {' and another '.join(changed)}: "
            f"{_shown(begun.get(changed[0]))}, now {_shown(record.get(changed[0]))}.",
            value=directory,
            fix="Continue with what the build was begun with, or start a new build.",
        )


class BuildRecord(Record):
    """`build.json`: seeds, layout and identities that every shard of a build shares."""

    record: dict[str, Any]


def begun_build(directory: Path) -> dict[str, Any]:
    """What an interrupted build in this directory was begun with; empty for a new one.

    Raises IntegrityError `damaged_file`.
    """
    file = directory / BUILD_FILE
    try:
        return BuildRecord.from_json(file.read_bytes()).record if file.exists() else {}
    except ValidationError as error:
        raise damaged(file, first_problem(error)) from error


def shared_engine(directory: Path, facts: EngineFacts | None) -> None:
    """Let all shards of a build be made by one engine of one version; raises IntegrityError `input_changed`."""
    if facts is None:
        return
    begun = begun_build(directory)
    record = {**begun, ENGINE: facts.to_dict()}
    if ENGINE in begun:
        open_build(directory, record)
    else:
        write_atomic(directory / BUILD_FILE, BuildRecord(record=record).sealed().to_json(indent=2))


def known_engine(begun: dict[str, Any]) -> dict[str, Any]:
    """The part of an interrupted build's record that only an opened engine says; `shared_engine` compares it."""
    return {ENGINE: begun[ENGINE]} if ENGINE in begun else {}


def built_shard(path: Path, make: Callable[[], tuple[Sequences, ShardNote]]) -> tuple[Sequences, ShardNote, bool]:
    """A shard's rows and note, and whether they were there already; a missing or damaged shard is made by `make`."""
    found = _finished(path)
    if found is not None:
        return *found, True
    rows, note = make()
    write_atomic(note_path(path), note.sealed().to_json())
    return rows, note, False


def drawn_shard(
    draw: Callable[[], Sequences], path: Path, check_fence: Callable[[], None]
) -> tuple[Sequences, ShardNote]:
    """Rows that are drawn, written to `path`, and their note; for `built_shard`."""
    begun = time.perf_counter()
    drawn = draw()
    shard = write_shard(path, drawn, check_fence=check_fence)
    return drawn, ShardNote(shard=shard, seconds=time.perf_counter() - begun)


def note_path(shard: Path) -> Path:
    """The path of a shard's note."""
    return shard.with_name(shard.name + NOTE_SUFFIX)


def close_build(directory: Path) -> None:
    """Remove what only an unfinished build needs."""
    for note in directory.glob("*" + NOTE_SUFFIX):
        note.unlink()
    (directory / BUILD_FILE).unlink(missing_ok=True)


def _same(begun: Any, now: Any) -> bool:
    if isinstance(begun, dict) and isinstance(now, dict) and "weights" in begun.keys() & now.keys():
        # An identity of an earlier version: the hashes that it has not are not compared.
        absent = {"configuration", "encoding"} - (begun.keys() & now.keys())
        begun, now = ({name: v for name, v in side.items() if name not in absent} for side in (begun, now))
    return bool(begun == now)


def _finished(path: Path) -> tuple[Sequences, ShardNote] | None:
    try:
        note = ShardNote.from_json(note_path(path).read_bytes())
        return read_shard(path, sha256=note.shard.sha256), note
    except (OSError, ValidationError, IntegrityError):
        return None


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} {value.get('version', '')}".strip()[:120]
    return str(value)[:120]
