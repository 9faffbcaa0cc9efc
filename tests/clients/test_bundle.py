"""The Claude Desktop bundle: validated and packed by Anthropic's own tool."""

import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "tools" / "docs" / "mcpb.py"


def test_the_bundle_is_valid_and_packs(node, tmp_path):
    folder = tmp_path / "bundle"
    subprocess.run([sys.executable, str(BUILD), str(folder)], check=True, timeout=60)
    valid = node.run("mcpb", "validate", str(folder / "manifest.json"))
    assert valid.returncode == 0, valid.stdout + valid.stderr
    packed = node.run("mcpb", "pack", str(folder), str(tmp_path / "opd-mcp.mcpb"))
    assert packed.returncode == 0, packed.stdout + packed.stderr
    assert (tmp_path / "opd-mcp.mcpb").stat().st_size > 10_000
