"""The README's table of tools, made from the tools that the server registers.

Run: `python tools/readme_table.py [--check] [README.md]`. Replaces what stands between `<!-- tools:start -->` and
`<!-- tools:end -->`; with `--check` writes nothing and exits with 1 when the table is out of date.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from opd_mcp.jobs.service import JobService
from opd_mcp.server.json_schema import input_schema
from opd_mcp.server.tools import all_specs
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

START, END = "<!-- tools:start -->", "<!-- tools:end -->"
README = Path(__file__).resolve().parent.parent / "README.md"


def tools_table() -> str:
    """The table as Markdown: name, parameters (with `?` when optional), what the tool does."""
    with tempfile.TemporaryDirectory() as folder:
        specs = all_specs(JobService(Workspace(Path(folder)), AllowedRoots([])))
    rows = ["| tool | parameters | what it does |", "|---|---|---|"]
    rows += [
        f"| `{spec.name}` | {_parameters(input_schema(spec.request))} | {_cell(spec.description)} |" for spec in specs
    ]
    return "\n".join(rows)


def with_table(text: str, table: str) -> str:
    """The README's text with the table between the markers; raises ValueError when a marker is missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"The file needs the markers {START} and {END}, in this order.")
    return f"{before}{START}\n{table}\n{END}{after}"


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
    parser.add_argument("readme", type=Path, nargs="?", default=README)
    arguments = parser.parse_args()
    old = arguments.readme.read_text(encoding="utf-8")
    new = with_table(old, tools_table())
    if arguments.check and new != old:
        print(f"{arguments.readme}: the tool table is out of date; run python tools/readme_table.py", file=sys.stderr)
        return 1
    if not arguments.check:
        arguments.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
