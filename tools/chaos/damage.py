"""Flipped and truncated bytes in a finished workspace: each is detected or harmless, never a silently wrong result.

`damaged` runs this file twice: `look` reads what a server and a worker that reuses everything read, `compute` what
training reads. Each damages one file at a time in a copy, reads it as the product does, and compares.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.schemas.runs import RunStatus
from tools.chaos.damage_compute import compute
from tools.chaos.damage_look import look
from tools.chaos.damage_trials import Damage
from tools.chaos.workload import Place

PARTS = {"look": look, "compute": compute}


def damaged(
    root: Path, seed: int, count: int, undisturbed: tuple[Place, RunStatus], tell: Callable[[str], None]
) -> list[Damage]:
    """`count` damages, half of them to what is looked at and half to what is computed with."""
    root.mkdir(parents=True)
    place, status = undisturbed
    command = [sys.executable, str(Path(__file__))]
    given = [str(place.root / "home"), status.run_id, f"{seed}", str(count // 2)]
    started = [
        subprocess.Popen([*command, part, str(root / part), *given], stdout=subprocess.PIPE, text=True)
        for part in PARTS
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a part of the damage test ended early: {outputs}")
    found = [Damage(**item) for output in outputs for item in json.loads(output.splitlines()[-1])]
    by_file = Counter((damage.file.rsplit("/", 1)[-1], damage.outcome) for damage in found)
    tell(f"damage: {len(found)}, by file: " + ", ".join(f"{n} {f} {o}" for (f, o), n in sorted(by_file.items())))
    return found


if __name__ == "__main__":
    part, folder, home, run_id, given_seed, given_count = sys.argv[1:]
    rng = random.Random(f"{given_seed}/{part}")
    results = PARTS[part](Path(folder), Path(home), run_id, rng, int(given_count))
    print(json.dumps([asdict(result) for result in results]))
