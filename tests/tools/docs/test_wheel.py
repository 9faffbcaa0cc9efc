"""What the registry is told is what is built; `make test-wheel` builds, installs and runs it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import opd_mcp

ROOT = Path(__file__).resolve().parents[3]


def test_the_registrys_entry_names_this_version_and_options_that_serve_has():
    entry = json.loads((ROOT / "server.json").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [package] = entry["packages"]
    assert {entry["version"], package["version"], project["version"]} == {opd_mcp.__version__}
    assert package["identifier"] == project["name"]
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", entry["name"])
    assert len(entry["description"]) <= 100
    assert f"<!-- mcp-name: {entry['name']} -->" in (ROOT / "README.md").read_text(encoding="utf-8")
    install = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
    assert f"opd_mcp-{opd_mcp.__version__}-py3-none-any.whl" in install
    command, *options = package["packageArguments"]
    shown = subprocess.run(
        [sys.executable, "-m", "opd_mcp.cli", command["value"], "--help"], capture_output=True, text=True, check=True
    )
    assert all(option["name"] in shown.stdout for option in options)
