"""Some minutes of the 25 that `make chaos` takes: kills, full disks, damage, contention, hangs and lost indexes."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "chaos" / "run.py"


def result_of(*arguments: str) -> dict[str, int]:
    """What a run of the script prints at its end."""
    command = [sys.executable, str(SCRIPT), "--quick", "--seed", "5", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_nothing_is_lost_where_heartbeats_instead_of_locks_tell_that_a_worker_lives():
    result = result_of("--heartbeats", "--only", "worker", "--only", "server")
    assert result["worker_kills"] == result["worker_kills_equal"] == 5
    assert (result["server_kills"], result["lost_or_duplicate"]) == (5, 0)


def test_nothing_is_lost_corrupt_or_silently_different():
    result = result_of()
    assert result["worker_kills"] == result["worker_kills_equal"] == 5
    assert (result["server_kills"], result["lost_or_duplicate"]) == (5, 0)
    assert result["enospc_points"] >= 50
    assert result["damage"] == 40
    assert (result["corrupt"], result["silent"], result["contention_errors"]) == (0, 0, 0)
    assert (result["hangs"], result["hangs_ended"]) == (3, 3)
    assert (result["index_losses"], result["index_lost_or_duplicate"]) == (7, 0)
