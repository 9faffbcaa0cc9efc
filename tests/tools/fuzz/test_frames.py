"""A small part of what `python tools/fuzz/frames.py` does with 20,000 lines."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "fuzz" / "frames.py"


def test_every_line_that_asks_is_answered_and_the_server_lives_on():
    command = [sys.executable, str(SCRIPT), "--lines", "300", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == 0
    assert min(report["answers"][kind] for kind in ("-32700", "-32600", "result")) > 0
