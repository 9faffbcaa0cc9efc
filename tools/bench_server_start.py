"""How long a client waits for our server, against a bare SDK server: start + connect + list tools, over stdio.

Run: `python tools/bench_server_start.py [--rounds 9] [--json FILE] [--limit 1.5]`. The two are measured in turns, so
that a busy machine slows both. Prints the medians and their ratio; exits with 1 when the ratio is above `--limit`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

BARE = """
from mcp.server import MCPServer
server = MCPServer("bare")
@server.tool()
def add(a: int, b: int) -> int:
    return a + b
server.run("stdio")
"""


async def seconds_to_list(server: StdioServerParameters) -> float:
    """Seconds from spawning the server to holding its list of tools."""
    start = time.perf_counter()
    async with Client(server) as client:
        await client.list_tools()
        return time.perf_counter() - start


async def measured(rounds: int) -> dict[str, float]:
    """Medians over the rounds and their ratio; one unmeasured round of each comes first (file caches)."""
    with tempfile.TemporaryDirectory() as home:
        script = Path(home) / "bare.py"
        script.write_text(BARE, encoding="utf-8")
        servers = {
            "bare": StdioServerParameters(command=sys.executable, args=[str(script)]),
            "opd_mcp": StdioServerParameters(
                command=sys.executable, args=["-m", "opd_mcp.cli", "serve"], env={"OPD_HOME": f"{home}/workspace"}
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(rounds + 1):
            for name, server in servers.items():
                seconds = await seconds_to_list(server)
                if number:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["opd_mcp"] / medians["bare"], "rounds": rounds}


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=1.5)
    arguments = parser.parse_args()
    result = anyio.run(measured, arguments.rounds)
    print(
        f"bare SDK server {result['bare']:.3f} s, opd-mcp {result['opd_mcp']:.3f} s, "
        f"ratio {result['ratio']:.2f} (median of {arguments.rounds}, in turns)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["ratio"] <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())
