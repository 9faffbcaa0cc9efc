"""The workspace is its owner's alone."""

import stat

import pytest

from opd_mcp.schemas.errors import PathError
from opd_mcp.store.workspace import Workspace, require_private


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_wide_open_workspace_is_tightened(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    workspace = Workspace(tmp_path / "home")
    assert mode_of(workspace.root) == 0o700
    assert all(mode_of(folder) == 0o700 for folder in (workspace.runs, workspace.artifacts, workspace.plans))


def test_a_link_is_no_private_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PathError, match="unsafe_folder"):
        require_private(tmp_path / "link")
