"""The documents name files that exist, and configurations that the command line takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("tools/*.md"),
    )
)
CLIENTS = ROOT / "examples" / "claude_desktop"


def test_the_client_of_the_documents_goes_from_plan_to_report(examples, tmp_path):
    """The snippet as it stands, with this Python's server and few steps."""
    from agent_session import QUICK

    document = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```python\n(import anyio\n.*?)```", document, re.DOTALL)
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {"OPD_HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "runtime")}
    real = {
        'command="opd-mcp",': f"command={sys.executable!r}, env={environment!r},",
        'args=["serve"],': 'args=["-m", "opd_mcp.cli", "serve"],',
        '{"distill.steps": 200}': repr(QUICK),
    }
    for stated, here in real.items():
        assert snippet.count(stated) == 1
        snippet = snippet.replace(stated, here)
    (tmp_path / "client.py").write_text(snippet, encoding="utf-8")
    done = subprocess.run([sys.executable, "client.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("succeeded {'distilled': ")
    assert "# Benchmark" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    package = ROOT / "opd_mcp"
    folders = "|".join(path.name for home in (ROOT, package) for path in home.iterdir() if path.name[0] not in "._")
    named = set(re.findall(rf"`(?:python )?((?:{folders})/[\w./-]+)", text))
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    missing = [name for name in named if not any((home / name).exists() for home in (ROOT, package))]
    missing += [name for name in linked if not (ROOT / document).parent.joinpath(name).exists()]
    assert not missing


def test_the_client_configuration_starts_a_server_once_its_paths_are_real(tmp_path):
    config = (CLIENTS / "claude_desktop_config.json").read_text(encoding="utf-8")
    assert config.strip() in (CLIENTS / "README.md").read_text(encoding="utf-8")
    entry = json.loads(config)["mcpServers"]["opd"]
    data = tmp_path / "models-and-prompts"
    data.mkdir()
    real = {"/absolute/path/to/models-and-prompts": str(data), "/absolute/path/to/workspace": str(tmp_path / "home")}
    command = [sys.executable, "-m", "opd_mcp.cli", *(real.get(part, part) for part in entry["args"])]
    environment = {name: real[value] for name, value in entry["env"].items()}

    async def tools() -> set[str]:
        server = StdioServerParameters(command=command[0], args=command[1:], env=environment)
        async with Client(server) as client:
            return {tool.name for tool in (await client.list_tools()).tools}

    assert {"plan_distillation", "get_run_status"} <= anyio.run(tools)
    assert (tmp_path / "home").is_dir()
