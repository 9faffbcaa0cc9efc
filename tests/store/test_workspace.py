"""The workspace's layout."""

import os
import stat

import pytest

from opd_mcp.schemas.errors import PathError
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


def test_a_folder_that_others_could_enter_is_closed(tmp_path):
    for name in ("home", "home/runs", "home/artifacts"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    workspace = Workspace(tmp_path / "home")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (workspace.root, workspace.runs)} == {0o700}


def test_a_folder_for_everybody_is_no_workspace_and_stays_as_it_is(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(PathError, match="OPD_HOME") as caught:
        Workspace(tmp_path / "shared")
    assert caught.value.code == "unsafe_folder"
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o1777
    assert not list((tmp_path / "shared").iterdir())


def test_a_part_of_the_workspace_is_no_link_to_elsewhere(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home" / "runs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PathError, match="runs"):
        Workspace(tmp_path / "home")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_user_s_folder_is_refused(tmp_path):
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 12345, 12345)
    with pytest.raises(PathError, match="another user"):
        Workspace(tmp_path / "home")
