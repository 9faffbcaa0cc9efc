"""The folder of the Claude Desktop bundle: manifest, pyproject and sources, ready for `mcpb pack`.

Run: `python tools/build_mcpb.py FOLDER`, then `npx @anthropic-ai/mcpb pack FOLDER opd-mcp.mcpb`. The bundle's
`server.type` is `uv`: Claude Desktop installs Python and the dependencies of pyproject.toml by itself, once. The
manifest's tools are those that the server registers.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import opd_mcp
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import offered_tools

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "examples" / "claude_desktop" / "manifest.json"
SOURCES = ("opd_mcp", "examples")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def manifest() -> dict[str, Any]:
    """The template with version and tools filled in; tools for an app's page alone are not listed."""
    shown = [
        spec for spec in offered_tools(ServerSettings()) if (spec.meta or {}).get("ui", {}).get("visibility") != ["app"]
    ]
    found: dict[str, Any] = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    found["version"] = opd_mcp.__version__
    found["tools"] = [{"name": spec.name, "description": spec.description} for spec in shown]
    return found


def build(folder: Path) -> None:
    """Fill a new folder with the bundle's content; FileExistsError when it is there already."""
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
