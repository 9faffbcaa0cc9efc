"""Three minutes of the 25 that `make chaos` takes: kills, full disks, damage, contention, hangs and lost indexes."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "chaos" / "run.py"


def test_nothing_is_lost_corrupt_or_silently_different():
    command = [sys.executable, str(SCRIPT), "--quick", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["worker_kills"] == result["worker_kills_equal"] == 5
    assert (result["server_kills"], result["lost_or_duplicate"]) == (5, 0)
    assert result["enospc_points"] >= 50
    assert result["damage"] == 40
    assert (result["corrupt"], result["silent"], result["contention_errors"]) == (0, 0, 0)
    assert (result["hangs"], result["hangs_ended"]) == (3, 3)
    assert (result["index_losses"], result["index_lost_or_duplicate"]) == (7, 0)
