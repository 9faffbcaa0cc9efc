"""Flipped and truncated bytes in a finished workspace: each is detected, or harmless; never another result in silence.

`damaged` runs this file twice: `look` goes through what a server and a worker that reuses everything read, `compute`
through what training reads. Both damage one file at a time in a copy, read it as the product does, and compare.
"""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from chaos_workload import Place

from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.runs import RunStatus

Outcome = Literal["detected", "harmless", "silent"]
SIGNS = ("damaged", "error:", '"lost"', '"failed"', "mismatch")
"""What an answer says of damage: an error or alert, or a run that is not called finished."""


@dataclass(frozen=True)
class Damage:
    """One damaged file, what it led to, and what differed or was said."""

    file: str
    how: str
    outcome: Outcome
    why: str = ""


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
        for part in ("look", "compute")
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a part of the damage test ended early: {outputs}")
    found = [Damage(**item) for output in outputs for item in json.loads(output.splitlines()[-1])]
    by_file = Counter((damage.file.rsplit("/", 1)[-1], damage.outcome) for damage in found)
    tell(f"damage: {len(found)}, by file: " + ", ".join(f"{n} {f} {o}" for (f, o), n in sorted(by_file.items())))
    return found


def spoil(file: Path, rng: random.Random) -> str:
    """Flip a byte of a file, or cut off its end; answers what was done."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.25:
        file.write_bytes(content[:place])
        return f"cut at {place} of {len(content)}"
    content[place] ^= rng.randrange(1, 256)
    file.write_bytes(content)
    return f"byte {place} of {len(content)} flipped"


def outcome_of(expected: dict[str, Any], found: dict[str, Any]) -> tuple[Outcome, str]:
    """How the answers to the same questions differ; one that differs without a sign of damage is silent."""
    different = [name for name in expected if found.get(name) != expected[name]]
    unsigned = [name for name in different if not any(sign in json.dumps(found.get(name)) for sign in SIGNS)]
    if unsigned:
        return "silent", ", ".join(f"{name}: {json.dumps(found.get(name))[:300]}" for name in unsigned)
    return ("detected", str(found[different[0]])[:200]) if different else ("harmless", "")


def answer(question: Callable[[], Any]) -> Any:
    """What a question is answered, errors included."""
    try:
        return question()
    except OpdError as error:
        return f"error: {error.code}: {error.value}"
    except Exception as error:  # a run would fail with it, as an internal error
        return f"error: unnamed: {error!r}"


def run_trials(
    files: list[Path],
    base: Path,
    count: int,
    rng: random.Random,
    copied: Callable[[Path], Path],
    questions: Callable[[], dict[str, Any]],
) -> list[Damage]:
    """Damage one file of a fresh copy after the other, in turn, and ask."""
    copied(base)
    expected = questions()
    if broken := [name for name, value in expected.items() if "error:" in str(value)]:
        raise RuntimeError(f"undamaged, and yet: {broken}, {expected}")
    copied(base)
    again = questions()
    if expected != again:
        raise RuntimeError(f"undamaged, and yet different: {[n for n in expected if expected[n] != again[n]]}")
    found = []
    order = files * (count // len(files) + 1)
    for file in order[:count]:
        how = spoil(copied(base) / file, rng)
        outcome, why = outcome_of(expected, answers_of(questions))
        found.append(Damage(str(file), how, outcome, why))
    return found


def answers_of(questions: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answers, or that there are none."""
    found = answer(questions)
    return found if isinstance(found, dict) else {"everything": found}


def fresh_copy(source: Path, target: Path) -> Path:
    """The target as a new copy of the source."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


if __name__ == "__main__":
    from chaos_damage_compute import compute
    from chaos_damage_look import look

    part, folder, home, run_id, given_seed, given_count = sys.argv[1:]
    trials = {"look": look, "compute": compute}[part]
    results = trials(Path(folder), Path(home), run_id, random.Random(f"{given_seed}/{part}"), int(given_count))
    print(json.dumps([asdict(result) for result in results]))
