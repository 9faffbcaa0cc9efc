"""Scripts for people who work on the project; README.md says which make target runs what.

They import opd_mcp, never the reverse, and are not in the wheel. A script that is run by its path puts the checkout on
`sys.path` first, so it needs no installation and finds its own checkout's opd_mcp and the other rooms.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "arithmetic"
"""The embedded task: prompt sets, two teachers and a student."""
