"""The workspace's layout."""

import stat

from opd_mcp.store.workspace import ARTIFACT_KINDS, Workspace, default_workspace_root


def test_the_workspace_is_made_private_and_complete(tmp_path):
    workspace = Workspace(tmp_path / "a" / "home")
    directories = [workspace.root, workspace.runs, workspace.artifacts, workspace.plans, workspace.hub]
    directories += [workspace.artifacts_of(kind) for kind in ARTIFACT_KINDS]
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in directories} == {0o700}
    assert not workspace.index.exists(), "the index is made when it is first needed"


def test_opening_again_changes_nothing(workspace):
    (workspace.runs / "keep").mkdir()
    assert Workspace(workspace.root) == workspace
    assert (workspace.runs / "keep").is_dir()


def test_the_root_is_its_real_path(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Workspace(tmp_path / "link").root == tmp_path / "real"


def test_the_default_is_an_absolute_folder_of_the_user():
    assert default_workspace_root().is_absolute()
    assert default_workspace_root().name == "opd-mcp"
