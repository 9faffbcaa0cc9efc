"""A small part of what `python tools/fuzz/connections.py` does with 5,000 connections."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "fuzz" / "connections.py"


def test_hostile_connections_are_answered_or_ended_and_the_server_lives_on():
    command = [sys.executable, str(SCRIPT), "--connections", "150", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == report["outside"] == 0
    seen = set(report["answers"])
    assert seen >= {"half-open 408", "json-rpc 200", "name 421", "origin 403", "cookie 401", "large headers 431"}
