"""The GPU's tables in the performance page are those of the committed report."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_shows_the_committed_report() -> None:
    command = [sys.executable, str(ROOT / "tools/docs/gpu_table.py"), str(ROOT / "docs/gpu-h200.json")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert len(printed.splitlines()) > 20
    assert printed in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
