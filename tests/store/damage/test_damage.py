"""Damaged files are detected and named, and hide nothing else."""

import json
import random
import shutil
from pathlib import Path

import pytest

from opd_mcp.identity.lineage import read_lineage, write_lineage
from opd_mcp.schemas.base import Record
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.artifacts import ArtifactRecord, read_artifact
from opd_mcp.store.journal import read_journal
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import RECORD_FILE, RunLock, begin_attempt, read_record


@pytest.fixture
def artifact(store):
    building = store.artifacts.new_building_directory("responses")
    (building / "rows.jsonl").write_text('{"prompt": "1+1=?"}\n')
    write_lineage(building, Lineage(kind="report", stage="responses", recipe={"seed": 3}))
    return store.artifacts.publish("responses", building, "responses-1", "key")


@pytest.fixture
def directory(store, make_record) -> Path:
    started = store.start_once(make_record())
    started.lock.release()
    return store.workspace.run(started.run_id)


def flipped(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["run.json", "lineage.json", "artifact.json"])
def test_every_flipped_bit_is_detected_or_changes_nothing(artifact, directory, name):
    file = directory / name if name == "run.json" else artifact.path / name
    read = {
        "run.json": lambda: read_record(directory),
        "lineage.json": lambda: read_lineage(artifact.path),
        "artifact.json": lambda: read_artifact(artifact.path).record,
    }[name]
    content, good, rng = file.read_bytes(), read(), random.Random(0)
    errors: list[IntegrityError] = []
    for _ in range(200):
        file.write_bytes(flipped(content, rng))
        try:
            assert read() == good  # white space, for instance
        except IntegrityError as error:
            errors.append(error)
    assert len(errors) > 150
    assert {error.code for error in errors} == {"damaged_file"}
    assert all(name in str(error) for error in errors)


def test_a_cut_or_missing_record_is_named(directory):
    content = (directory / RECORD_FILE).read_bytes()
    for rest in (b"", content[:40], content[:-2]):
        (directory / RECORD_FILE).write_bytes(rest)
        with pytest.raises(IntegrityError, match=r"run\.json"):
            read_record(directory)


def test_one_damaged_run_hides_no_other(store, make_record, directory):
    other = store.start_once(make_record("other"))
    (directory / RECORD_FILE).write_text("{}")
    assert store.list_runs().total == 2
    assert store.record(other.run_id)
    [problem] = store.damaged()
    assert str(directory) in str(problem.value)
    other.lock.release()


def test_one_damaged_artifact_hides_no_other(store, artifact):
    building = store.artifacts.new_building_directory("responses")
    store.artifacts.publish("responses", building, "responses-2", "key-2")
    (artifact.path / "artifact.json").write_text("{")
    assert [found.artifact_id for found in store.artifacts.list()] == ["responses-2"]
    assert store.artifacts.find_by_key("responses", "key-2") is not None
    with pytest.raises(IntegrityError, match=r"artifact\.json"):
        store.artifacts.get("responses-1")
    assert [problem.code for problem in store.damaged()] == ["damaged_file"]


@pytest.mark.parametrize("kind", [RunRecord, ArtifactRecord, Lineage, CacheManifest])
def test_the_first_version_is_brought_forward_and_a_later_one_refused(kind: type[Record]):
    fixture = json.loads((Path(__file__).parent / "version_1" / f"{kind.__name__}.json").read_text())
    assert fixture["schema_version"] == 1
    record = kind.from_json(json.dumps(fixture))
    assert record.schema_version == kind.current_version() == (3 if kind is RunRecord else 2)
    assert kind.from_json(record.sealed().to_json()) == record.sealed()
    with pytest.raises(ValueError, match="schema version 99 is not known"):
        kind.from_json(json.dumps({**fixture, "schema_version": 99}))


def test_an_artifact_whose_maker_died_before_the_index_knew_it_is_found(store, artifact):
    store.index.remove_artifact("responses-1")
    assert store.artifacts.find_by_key("responses", "key") is None
    assert store.artifacts.find_made("responses", "responses-1", "another key") is None
    assert store.artifacts.find_made("responses", "responses-1", "key") is not None
    assert store.artifacts.find_by_key("responses", "key") is not None


def test_a_journal_of_the_first_version_is_read_and_gone_on_with(directory):
    shutil.copy(Path(__file__).parent / "version_1" / "journal.jsonl", directory / "journal.jsonl")
    view = RunView(directory).refresh()
    assert (view.state, view.error.code, view.metrics["loss"].last) == ("failed", "internal_error", 0.5)
    with RunLock.acquire(directory) as lock:
        assert begin_attempt(lock) == 2
        assert RunView(directory).refresh().state == "queued"
    assert len(read_journal(directory / "journal.jsonl")) == 9
