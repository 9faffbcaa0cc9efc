"""Eight processes at once on one workspace: they start, list, read, publish and cancel.

`contention` starts them; each runs this file with ROOT, SECONDS and SEED, and prints what it did as one JSON line.
"""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.requests import GetRunMetrics, ListArtifacts, SampleModel
from opd_mcp.service import JobService
from tools import EXAMPLE
from tools.chaos.processes import command
from tools.chaos.workload import Place

PROCESSES = 8
RUN_SECONDS = 0.5
ALLOWED = {"run_not_active", "unknown_run"}
"""Errors that a call may give when another process was faster."""
WEIGHTS = {"list": 30, "status": 25, "metrics": 12, "publish": 12, "artifacts": 8, "start": 7, "cancel": 6}


def contention(root: Path, seed: int, seconds: float, tell: Callable[[str], None]) -> list[str]:
    """The errors that reached a caller within these seconds, such as `database is locked`."""
    root.mkdir(parents=True)
    words = [sys.executable, str(Path(__file__)), str(root), str(seconds)]
    processes = [
        subprocess.Popen([*words, f"{seed}/{number}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(PROCESSES)
    ]
    calls: Counter[str] = Counter()
    errors: list[str] = []
    for process in processes:
        out, err = process.communicate(timeout=seconds + 240)
        if process.returncode:
            errors.append(err[-2000:])
            continue
        report = json.loads(out.splitlines()[-1])
        calls.update(report["calls"])
        errors += report["errors"]
    tell(f"contention: {calls.total()} calls of {PROCESSES} processes in {seconds:.0f} s: {dict(calls)}")
    missing = [name for name in WEIGHTS if not calls[name]]
    return errors + [f"no process called {name}" for name in missing]


def hammer(root: Path, seconds: float, seed: str, without: str = "") -> dict[str, Any]:
    """One process's calls by name, none of the name `without`, and the errors that it got."""
    place, rng = Place(root, command("idle", RUN_SECONDS)), random.Random(seed)
    service = place.service()
    calls: Counter[str] = Counter()
    errors: list[str] = []
    weights = {name: weight for name, weight in WEIGHTS.items() if name != without}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = rng.choices(list(weights), list(weights.values()))[0]
        try:
            call(service, name, rng)
        except OpdError as error:
            if error.code not in ALLOWED:
                errors.append(f"{name}: {error}")
        except Exception as error:  # any other exception that reaches a caller is a finding
            errors.append(f"{name}: {error!r}")
        calls[name] += 1
    return {"calls": calls, "errors": errors[:20]}


def call(service: JobService, name: str, rng: random.Random) -> None:
    """One call of this name."""
    match name:
        case "list":
            service.list_runs(limit=20)
        case "status":
            service.status("latest")
        case "metrics":
            service.run_metrics(GetRunMetrics(run_ids=["latest"]))
        case "artifacts":
            service.list_artifacts(ListArtifacts())
        case "publish":
            key = f"{rng.getrandbits(64):016x}"
            building = service.store.artifacts.new_building_directory("prompts")
            (building / "prompts.jsonl").write_text('{"prompt":"1+1=?"}\n', encoding="utf-8")
            service.store.artifacts.publish("prompts", building, f"prompts-{key}", key)
        case "start":
            prompt = f"{rng.randint(0, 9)}+1=?"  # few prompts, so that two processes often want the same run
            service.sample_model(SampleModel(model=str(EXAMPLE / "student"), prompts=[prompt]))
        case _:
            service.cancel("latest")


if __name__ == "__main__":
    print(json.dumps(hammer(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])))
