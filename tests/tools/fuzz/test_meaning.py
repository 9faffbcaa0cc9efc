"""A small part of what `python tools/fuzz/meaning.py` does with 2,000 models."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "fuzz" / "meaning.py"


def test_models_that_mean_something_else_are_judged_and_open_nothing_outside():
    command = [sys.executable, str(SCRIPT), "--models", "40", "--runs", "1", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == report["outside"] == 0
    assert report["processes"] >= 2  # the server and a worker
    kinds = {outcome.partition(":")[0] for outcome in report["outcomes"]}
    assert kinds == {"configuration", "tokenizer settings", "tokenizer", "template", "lineage"}
