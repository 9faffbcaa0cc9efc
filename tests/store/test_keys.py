"""The key of a workspace: one, private, made once; what it signed is proven, what it did not is asserted."""

import json
import shutil
import stat
import subprocess
import sys

import pytest

from opd_mcp.identity.lineage import LINEAGE_FILE, write_lineage
from opd_mcp.identity.signatures import SIGNATURE_FILE
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.store.artifacts import ARTIFACT_FILE, ArtifactRecord, require_intact
from opd_mcp.store.keys import workspace_key
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import LINEAGE_KEY, Workspace

MAKE_KEY = """
import sys
from pathlib import Path
from opd_mcp.store.keys import workspace_key
from opd_mcp.store.workspace import Workspace
print(workspace_key(Workspace(Path(sys.argv[1]))).key.secret.hex())
"""


@pytest.fixture
def store(tmp_path):
    return Store(Workspace(tmp_path / "home"))


def published(store: Store, artifact_id: str = "report-1"):
    """A report with a lineage, published by a store."""
    building = store.artifacts.new_building_directory("report")
    (building / "report.json").write_text("{}")
    write_lineage(building, Lineage(kind="report", stage="benchmark", recipe={}))
    return store.artifacts.publish("report", building, artifact_id=artifact_id, key=artifact_id)


def as_of_before(path, **changes):
    """Make a published artifact look as it did before lineages were signed."""
    (path / SIGNATURE_FILE).unlink()
    record = ArtifactRecord.from_json((path / ARTIFACT_FILE).read_bytes())
    files = {name: sha256 for name, sha256 in record.files.items() if name != SIGNATURE_FILE}
    update = {"files": files, "created_at": "2020-01-01T00:00:00.000Z", **changes}
    (path / ARTIFACT_FILE).write_text(record.model_copy(update=update).sealed().to_json())


def test_the_key_is_private_and_made_once_by_whoever_comes_first(tmp_path):
    command = [sys.executable, "-c", MAKE_KEY, str(tmp_path / "home")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    secrets = {process.communicate()[0].strip() for process in processes}
    assert len(secrets) == 1
    file = tmp_path / "home" / LINEAGE_KEY
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secrets == {workspace_key(Workspace(tmp_path / "home")).key.secret.hex()}
    file.chmod(0o644)
    workspace_key(Workspace(tmp_path / "home"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_workspaces_have_two_keys(tmp_path):
    one, two = (workspace_key(Workspace(tmp_path / name)).key for name in ("one", "two"))
    assert one != two


def test_a_damaged_key_is_named_and_not_replaced(store):
    file = store.workspace.root / LINEAGE_KEY
    file.write_text(json.dumps({"secret": "short", "created_at": "2020"}))
    with pytest.raises(IntegrityError, match=r"lineage\.key") as caught:
        published(store)
    assert caught.value.code == "damaged_file"
    assert "short" in file.read_text()


def test_what_is_published_is_signed_and_stays_proven_when_it_is_copied(store, tmp_path):
    artifact = published(store)
    require_intact(artifact)
    assert artifact.record.files.keys() == {"report.json", LINEAGE_FILE, SIGNATURE_FILE}
    assert store.artifacts.made_here(artifact.path)
    assert store.artifacts.made_here(shutil.copytree(artifact.path, tmp_path / "copy"))
    assert Store(Workspace(tmp_path / "home")).artifacts.made_here(artifact.path)


def test_another_workspaces_artifact_is_not_made_here_wherever_it_lies(store, tmp_path):
    theirs = published(Store(Workspace(tmp_path / "theirs")))
    assert not store.artifacts.made_here(theirs.path)
    put = shutil.copytree(theirs.path, store.workspace.artifacts_of("report") / "report-1")
    assert not store.artifacts.made_here(put)


def test_a_directory_without_signature_is_not_made_here(store, tmp_path):
    (tmp_path / "model").mkdir()
    write_lineage(tmp_path / "model", Lineage(kind="report", stage="another", recipe={}))
    assert not store.artifacts.made_here(tmp_path / "model")
    shutil.copy(published(store).path / SIGNATURE_FILE, tmp_path / "model")
    assert not store.artifacts.made_here(tmp_path / "model"), "the signature of another lineage"


def test_an_artifact_of_before_counts_in_its_place_alone(store, tmp_path):
    path = published(store).path
    as_of_before(path)
    assert store.artifacts.made_here(path)
    assert not store.artifacts.made_here(shutil.copytree(path, tmp_path / "copy"))
    renamed = shutil.copytree(path, path.with_name("report-2"))
    assert not store.artifacts.made_here(renamed)
    write_lineage(path, Lineage(kind="report", stage="benchmark", recipe={"another": 1}))
    assert not store.artifacts.made_here(path)


def test_an_unsigned_artifact_that_is_younger_than_the_key_does_not_count(store):
    path = published(store).path
    as_of_before(path, created_at="2999-01-01T00:00:00.000Z")
    assert not store.artifacts.made_here(path)


def test_a_lost_key_makes_proofs_assertions(store):
    artifact = published(store)
    (store.workspace.root / LINEAGE_KEY).unlink()
    again = Store(store.workspace)
    assert not again.artifacts.made_here(artifact.path)
    assert again.artifacts.made_here(published(again, "report-2").path)
