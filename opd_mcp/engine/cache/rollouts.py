"""The student's rollouts on disk, before the teacher has scored them: shards and one small record."""

from pathlib import Path

from pydantic import ValidationError

from opd_mcp.engine.cache.shards import damaged, read_shards
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.base import Record
from opd_mcp.schemas.cache import BuildLayout, EngineGap, Hygiene, RolloutStatistics, Shard
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import Sampling

RECORD_FILE = "rollouts.json"


class RolloutRecord(Record):
    """`rollouts.json`: who drew the rollouts, how, and what they look like."""

    behaviour: ModelIdentity
    prompts_sha256: str
    sampling: Sampling
    seed: int
    eos_token_ids: list[int]
    shards: list[Shard]
    layout: BuildLayout
    statistics: RolloutStatistics
    hygiene: Hygiene
    engine_gap: EngineGap | None = None


def write_record(directory: Path, record: RolloutRecord) -> None:
    """Write the record; it stands only beside complete shards."""
    write_atomic(directory / RECORD_FILE, record.sealed().to_json(indent=2))


def read_record(directory: Path) -> RolloutRecord:
    """The record of complete rollouts; raises IntegrityError `damaged_file`."""
    try:
        return RolloutRecord.from_json((directory / RECORD_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise damaged(directory / RECORD_FILE, "it is missing or not what was written") from error


def read_rollouts(directory: Path) -> Sequences:
    """All rollouts, checked against their hashes."""
    return read_shards(directory, read_record(directory).shards)
