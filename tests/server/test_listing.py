"""What `tools/list` answers is part of the contract: a change shows up here as a difference to review.

After a wanted change: `python tests/server/test_listing.py`.
"""

import json
import tempfile
from pathlib import Path

from opd_mcp.server.protocol.sdk_tool import sdk_tool
from opd_mcp.server.serve import ServerSettings
from opd_mcp.server.tools.table import offered_tools
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

SNAPSHOT = Path(__file__).with_name("tools_list.json")


def listing(folder: Path) -> dict[str, dict[str, object]]:
    """Description, input and output schema by tool."""
    service, settings = JobService(Workspace(folder), AllowedRoots([])), ServerSettings()
    return {
        tool.name: {"description": tool.description, "input": tool.parameters, "output": tool.output_schema}
        for tool in (sdk_tool(spec, service, settings) for spec in offered_tools(settings))
    }


def test_the_tools_are_as_they_were_agreed(tmp_path):
    assert listing(tmp_path) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        SNAPSHOT.write_text(json.dumps(listing(Path(folder)), indent=1) + "\n", encoding="utf-8")
