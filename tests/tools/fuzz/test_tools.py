"""A small part of what `python tools/fuzz/tools.py` does with 20,000 calls."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "fuzz" / "tools.py"


def test_odd_calls_are_answered_clearly_and_start_nothing_by_mistake():
    command = [sys.executable, str(SCRIPT), "--calls", "300", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == 0
    assert report["results"] + report["errors"] == 300
    assert min(report["results"], report["errors"], report["runs_started"]) > 0
