"""The workspace's layout."""

import stat

import pytest

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.store.workspace import ARTIFACT_KINDS, SETTINGS_FILE, Workspace, default_workspace_root, write_setting


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '[engines]\nvllm = "/a"\n'),
        ("[quotas]\nmax_running_runs = 1\n", '[quotas]\nmax_running_runs = 1\n\n[engines]\nvllm = "/a"\n'),
        ('[engines] # mine\nvllm = "/b"\nrestarts = 1\n', '[engines] # mine\nvllm = "/a"\nrestarts = 1\n'),
    ],
)
def test_a_setting_is_written_and_every_other_line_stays(workspace, before, after):
    file = workspace.root / SETTINGS_FILE
    if before:
        file.write_text(before)
    write_setting(workspace, "engines", "vllm", "/a")
    assert file.read_text() == after


def test_a_file_that_no_line_can_be_added_to_stays_as_it_is(workspace):
    file = workspace.root / SETTINGS_FILE
    file.write_text("engines = { restarts = 1 }\n")
    with pytest.raises(ArgumentError, match=r'invalid_setting.*below \[engines\] it needs: vllm = "/a"'):
        write_setting(workspace, "engines", "vllm", "/a")
    assert file.read_text() == "engines = { restarts = 1 }\n"
