"""A small part of what `python tools/fuzz/readers.py` does with 20,000 damaged files."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "fuzz" / "readers.py"


def test_damaged_files_are_read_as_what_they_say_or_refused_with_one_clear_error():
    command = [sys.executable, str(SCRIPT), "--files", "190", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == 0
    assert len(report["counts"]) == 19
    assert all(sum(outcomes.values()) == 10 for outcomes in report["counts"].values())
    assert report["counts"]["manifest.json"]["damaged_file"] > 5
