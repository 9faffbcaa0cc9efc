"""The command line on a machine with as little free memory, in bytes, as the file named first says."""

import sys
from pathlib import Path

from opd_mcp import cli
from opd_mcp.devices import hardware

if __name__ == "__main__":
    room = Path(sys.argv.pop(1))
    hardware.available_memory = lambda: int(room.read_text())
    cli.main()
