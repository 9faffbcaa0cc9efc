"""Artifacts: published whole, found by key, never invented."""

import shutil
import stat

import pytest

from opd_mcp.identity import files
from opd_mcp.identity.files import fsync_tree
from opd_mcp.schemas.errors import IntegrityError, UnknownIdError
from opd_mcp.store.artifacts import artifact_directories, require_intact


@pytest.fixture
def artifacts(store):
    return store.artifacts


def build(artifacts, text="rows"):
    building = artifacts.new_building_directory("cache")
    (building / "shards").mkdir()
    (building / "shards" / "0.parquet").write_text(text)
    return building


def test_a_published_artifact_is_found_by_id_and_by_key(artifacts):
    artifact = artifacts.publish("cache", build(artifacts), "cache-1", "key", run_id="run-1")
    assert (artifact.path / "shards" / "0.parquet").read_text() == "rows"
    assert artifact.record.bytes == 4
    assert artifacts.get("cache-1") == artifacts.find_by_key("cache", "key") == artifact
    assert artifacts.list("cache") == [artifact]
    assert artifacts.list("model") == []


def test_what_is_not_published_is_not_an_artifact(artifacts, workspace):
    building = build(artifacts)
    assert building.parent == workspace.artifacts_of("cache")
    assert stat.S_IMODE(building.stat().st_mode) == 0o700
    assert artifact_directories(workspace) == []
    assert artifacts.find_by_key("cache", "key") is None


def test_the_right_to_publish_is_asked_once_everything_is_on_the_disk(artifacts, workspace, monkeypatch):
    """A large artifact takes its time there, in which another attempt may take over."""
    events = []

    def lost():
        events.append("asked")
        raise PermissionError

    def written(directory):
        events.append("written")
        fsync_tree(directory)

    monkeypatch.setattr(files, "fsync_tree", written)
    with pytest.raises(PermissionError):
        artifacts.publish("cache", build(artifacts), "cache-1", "key", check_fence=lost)
    assert events == ["written", "asked"]
    assert artifact_directories(workspace) == []


def test_a_removed_directory_is_forgotten(artifacts):
    artifact = artifacts.publish("cache", build(artifacts), "cache-1", "key")
    shutil.rmtree(artifact.path)
    assert artifacts.find_by_key("cache", "key") is None
    assert artifacts.find("cache-1") is None
    assert artifacts.index.artifacts() == []


def test_the_same_result_twice_is_kept_once(artifacts, workspace):
    first = artifacts.publish("cache", build(artifacts, "first"), "cache-1", "key")
    second = artifacts.publish("cache", build(artifacts, "second"), "cache-1", "key")
    assert second == first
    assert (second.path / "shards" / "0.parquet").read_text() == "first"
    assert [path.name for path in workspace.artifacts_of("cache").iterdir()] == ["cache-1"]


def test_an_id_never_changes_its_meaning(artifacts):
    artifacts.publish("cache", build(artifacts), "cache-1", "key")
    with pytest.raises(IntegrityError) as caught:
        artifacts.publish("cache", build(artifacts), "cache-1", "another key")
    assert caught.value.code == "artifact_exists"


@pytest.mark.parametrize("artifact_id", ["cache-2", "../cache-1", ""])
def test_an_unknown_artifact_names_the_nearest(artifacts, artifact_id):
    artifacts.publish("cache", build(artifacts), "cache-1", "key")
    with pytest.raises(UnknownIdError) as caught:
        artifacts.get(artifact_id)
    assert caught.value.code == "unknown_artifact"
    assert caught.value.nearest == (["cache-1"] if artifact_id else [])


def test_a_damaged_record_is_an_error(artifacts):
    artifact = artifacts.publish("cache", build(artifacts), "cache-1", "key")
    (artifact.path / "artifact.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"artifact\.json"):
        artifacts.get("cache-1")


@pytest.mark.parametrize("damage", [lambda file: file.write_text("rowz"), lambda file: file.unlink()])
def test_a_changed_or_missing_file_of_an_artifact_is_named(artifacts, damage):
    artifact = artifacts.publish("cache", build(artifacts), "cache-1", "key")
    require_intact(artifact)
    damage(artifact.path / "shards" / "0.parquet")
    with pytest.raises(IntegrityError, match=r"damaged_file.*shards/0.parquet of cache-1"):
        require_intact(artifacts.get("cache-1"))


def test_a_building_directory_that_was_nearly_published_is_published_as_if_new(artifacts):
    building = build(artifacts)
    (building / "artifact.json").write_text("of a worker that died before the rename")
    artifact = artifacts.publish("cache", building, "cache-1", "key")
    assert artifact.record.bytes == 4
    require_intact(artifacts.get("cache-1"))


def test_links_in_a_building_directory_are_not_published(artifacts, tmp_path):
    building = build(artifacts)
    (building / "link").symlink_to(tmp_path)
    (building / "file_link").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"):
        artifacts.publish("cache", building, "cache-1", "key")
    assert artifacts.find("cache-1") is None


def test_a_resumable_directory_keeps_its_content_and_has_one_holder_at_a_time(artifacts, workspace):
    patience = iter([False, True])
    with artifacts.resumable_directory("cache", "score-abc", lambda: False) as first:
        (first / "shard").touch()
        with artifacts.resumable_directory("cache", "score-abc", lambda: next(patience)) as second:
            assert second is None, "it waited, and was asked to stop"
    with artifacts.resumable_directory("cache", "score-abc", lambda: False) as again:
        assert again == first
        assert (again / "shard").exists()
        artifacts.publish("cache", again, "cache-1", "key")
    assert [path.name for path in workspace.artifacts_of("cache").iterdir()] == ["cache-1"]
