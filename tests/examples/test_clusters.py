"""The files for clusters: an sbatch file and a SkyPilot task whose commands exist, and the settings of the guide."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from opd_mcp.cli import app
from opd_mcp.schemas.executors import SlurmExecutor, SshExecutor
from opd_mcp.schemas.runs import WorkspaceSettings

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "examples" / "clusters" / "distill.sbatch"
SKYPILOT = ROOT / "examples" / "clusters" / "skypilot.yaml"


def commands_in(text: str) -> list[list[str]]:
    """The words of each call of opd-mcp in a shell script."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    parts = [part for line in lines for part in re.split(r"\|\||;|&(?!\S)|'", line)]
    calls = [part[part.index("opd-mcp ") :] for part in parts if "opd-mcp " in part]
    return [shlex.split(call)[1:] for call in calls]


@pytest.mark.parametrize(
    "text", [SBATCH.read_text(), yaml.safe_load(SKYPILOT.read_text())["run"]], ids=["sbatch", "sky"]
)
def test_every_command_and_option_exists(text):
    calls = commands_in(text)
    assert {call[0] for call in calls} >= {"resume", "start", "watch"}
    known = typer.main.get_command(app).commands
    for name, *words in calls:
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, name


def test_the_sbatch_file_says_what_a_job_needs():
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SBATCH.read_text(), flags=re.MULTILINE))
    assert given["signal"] == "B:TERM@300"
    assert {"nodes", "ntasks", "cpus-per-task", "gres", "time", "output"} <= given.keys()
    SlurmExecutor(kind="slurm", memory_gb=1, time_limit=given["time"])


def test_the_skypilot_task_keeps_the_workspace_in_its_bucket():
    task = yaml.safe_load(SKYPILOT.read_text())
    [mount] = task["file_mounts"]
    assert task["envs"]["OPD_HOME"].startswith(f"{mount}/")
    [settings] = re.findall(r"echo '(.+)' > \S+/settings.toml", task["setup"])
    assert WorkspaceSettings.model_validate(tomllib.loads(settings)).index_folder == "/var/tmp/opd-index"


@pytest.mark.parametrize("page", ["guide/clusters.md", "tools.md"])
def test_the_settings_of_the_pages_can_be_used(page):
    text = (ROOT / "docs" / page).read_text()
    tables = [block for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL) if "[executors." in block]
    [settings] = [WorkspaceSettings.model_validate(tomllib.loads(table)) for table in tables]
    assert settings.executors


def test_the_guide_names_every_key():
    text = (ROOT / "docs" / "guide" / "clusters.md").read_text()
    for kind in (SlurmExecutor, SshExecutor):
        assert [name for name in kind.model_fields if f"`{name}`" not in text and f"`{name} = " not in text] == []
