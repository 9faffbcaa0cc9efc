"""The tables of tools and resources in docs/tools.md, generated from what the server registers.

Run: `make docs` or `python tools/docs/readme_table.py [--check] [FILE]`. Replaces the text between
`<!-- tools:start -->` and `<!-- tools:end -->`, and the same for `resources`. With `--check` it writes nothing and
exits with 1 when a table is out of date.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
from mcp import Client

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.server.app import build_server
from opd_mcp.server.protocol.json_schema import input_schema
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import offered_tools
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools import ROOT

DOCUMENT = ROOT / "docs" / "tools.md"


def tables() -> dict[str, str]:
    """The tables as Markdown, by the name in their markers."""
    with tempfile.TemporaryDirectory() as folder:
        service = JobService(Workspace(Path(folder)), AllowedRoots([]))
        return {"tools": tools_table(), "resources": anyio.run(resources_table, service)}


def tools_table() -> str:
    """Name, parameters (with `?` when optional), what the tool does."""
    rows = ["| tool | parameters | what it does |", "|---|---|---|"]
    rows += [
        f"| `{spec.name}` | {_parameters(input_schema(spec.request))} | {_cell(spec.description)} |"
        for spec in offered_tools(ServerSettings())
    ]
    return "\n".join(rows)


async def resources_table(service: JobService) -> str:
    """The table of resources and templates as a client lists them: address, form, content."""
    async with Client(build_server(service)) as client:
        listed = [(str(item.uri), item) for item in (await client.list_resources()).resources]
        templates = (await client.list_resource_templates()).resource_templates
        listed += [(item.uri_template, item) for item in templates]
    rows = ["| resource | form | what it holds |", "|---|---|---|"]
    rows += [f"| `{uri}` | `{item.mime_type}` | {_cell(item.description or str(item.title))} |" for uri, item in listed]
    return "\n".join(rows)


def with_table(text: str, name: str, table: str) -> str:
    """The text with the table between its markers; raises ValueError when a marker is missing."""
    opening, closing = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not start or not end:
        raise ValueError(f"The file needs the markers {opening} and {closing}, in this order.")
    return f"{before}{opening}\n{table}\n{closing}{after}"


def _parameters(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    shown = [f"`{name}`" if name in required else f"`{name}?`" for name in schema["properties"]]
    return ", ".join(shown) or "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("document", type=Path, nargs="?", default=DOCUMENT)
    arguments = parser.parse_args()
    new = old = arguments.document.read_text(encoding="utf-8")
    for name, table in tables().items():
        new = with_table(new, name, table)
    if arguments.check and new != old:
        print(
            f"{arguments.document}: a table is out of date; run `make docs`",
            file=sys.stderr,
        )
        return 1
    if not arguments.check:
        arguments.document.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
