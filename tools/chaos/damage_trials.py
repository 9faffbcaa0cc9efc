"""One trial after another: damage a file of a fresh copy, ask the same questions as before, and judge the answers."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd_mcp.schemas.errors import OpdError

Outcome = Literal["detected", "harmless", "silent"]
SIGNS = ("damaged", "error:", '"lost"', '"failed"', "mismatch")
"""How an answer shows damage: an error, an alert, or a run that is not called finished."""


@dataclass(frozen=True)
class Damage:
    """One damaged file, its outcome, and what differed or was reported."""

    file: str
    how: str
    outcome: Outcome
    why: str = ""


def spoil(file: Path, rng: random.Random) -> str:
    """Flip a byte of a file, or cut off its end; returns which."""
    content = bytearray(file.read_bytes())
    offset = rng.randrange(len(content))
    if rng.random() < 0.25:
        file.write_bytes(content[:offset])
        return f"cut at {offset} of {len(content)}"
    content[offset] ^= rng.randrange(1, 256)
    file.write_bytes(content)
    return f"byte {offset} of {len(content)} flipped"


def outcome_of(expected: dict[str, Any], found: dict[str, Any]) -> tuple[Outcome, str]:
    """How two sets of answers differ; a difference without a sign of damage is `silent`."""
    different = [name for name in expected if found.get(name) != expected[name]]
    unsigned = [name for name in different if not any(sign in json.dumps(found.get(name)) for sign in SIGNS)]
    if unsigned:
        return "silent", ", ".join(f"{name}: {json.dumps(found.get(name))[:300]}" for name in unsigned)
    return ("detected", str(found[different[0]])[:200]) if different else ("harmless", "")


def answer(question: Callable[[], Any]) -> Any:
    """The answer to a question, or the error as text."""
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
    """`count` trials: damage one file of a fresh copy of `base`, then ask all questions."""
    copied(base)
    expected = questions()
    if broken := [name for name, value in expected.items() if "error:" in str(value)]:
        raise RuntimeError(f"errors without any damage: {broken}, {expected}")
    copied(base)
    again = questions()
    if expected != again:
        raise RuntimeError(f"different answers without any damage: {[n for n in expected if expected[n] != again[n]]}")
    found = []
    order = files * (count // len(files) + 1)
    for file in order[:count]:
        how = spoil(copied(base) / file, rng)
        outcome, why = outcome_of(expected, answers_of(questions))
        found.append(Damage(str(file), how, outcome, why))
    return found


def answers_of(questions: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """All answers, or under `everything` why there are none."""
    found = answer(questions)
    return found if isinstance(found, dict) else {"everything": found}


def fresh_copy(source: Path, target: Path) -> Path:
    """Replace the target by a new copy of the source; returns the target."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
