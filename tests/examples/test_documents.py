"""The documents name files that exist, and configurations that the command line takes."""

import json
import re
import sys
from pathlib import Path

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["docs/method.md", "AGENTS.md", "examples/README.md", "examples/arithmetic/README.md"]
CLIENTS = ROOT / "examples" / "claude_desktop"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:opd_mcp|tests|tools|examples|docs)/[\w./-]+)`", text))
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
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
