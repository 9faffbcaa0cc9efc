"""The folder of the Claude Desktop bundle, ready for `mcpb pack`: manifest, pyproject and sources.

Run: `make bundle` or `python tools/docs/mcpb.py FOLDER`, then `npx @anthropic-ai/mcpb pack FOLDER opd-mcp.mcpb`. The
bundle's `server.type` is `uv`: Claude Desktop itself installs Python and the dependencies of pyproject.toml, once. The
manifest lists the tools that the server registers.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import opd_mcp
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import offered_tools
from tools import ROOT

TEMPLATE = ROOT / "examples" / "claude_desktop" / "manifest.json"
SOURCES = ("opd_mcp", "examples")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def manifest() -> dict[str, Any]:
    """The template with version and tools filled in, without the tools that only an app's page calls."""
    offered = offered_tools(ServerSettings())
    shown = [spec for spec in offered if (spec.meta or {}).get("ui", {}).get("visibility") != ["app"]]
    found: dict[str, Any] = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    found["version"] = opd_mcp.__version__
    found["tools"] = [{"name": spec.name, "description": spec.description} for spec in shown]
    return found


def build(folder: Path) -> None:
    """Fill a new folder with the bundle's content; raises FileExistsError when it exists."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest(), indent=2) + "\n", encoding="utf-8")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.folder)
    print(f"{arguments.folder}: pack it with npx @anthropic-ai/mcpb pack {arguments.folder} opd-mcp.mcpb")


if __name__ == "__main__":
    main()
