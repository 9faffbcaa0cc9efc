"""The shipped prompt sets are the generator's, and no prompt is in two of them."""

import itertools
import json
from pathlib import Path

from tools.demo.data import prompt_sets

ROOT = Path(__file__).resolve().parents[3]
# Of tune.jsonl, the rows that were a final set until looks at its results had steered a choice.
RETIRED = slice(400, 900)


def rows_of(name: str) -> list[dict[str, str]]:
    file = ROOT / "examples" / "arithmetic" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts_of(name: str) -> list[str]:
    return [row["prompt"] for row in rows_of(name)]


def test_the_five_sets_are_disjoint() -> None:
    tune = prompts_of("tune")
    sets = {name: prompts_of(name) for name in ("sft", "opd", "eval")}
    sets |= {"tune": tune[: RETIRED.start], "retired": tune[RETIRED]}
    assert {name: len(prompts) for name, prompts in sets.items()} == {
        "sft": 350, "opd": 3200, "tune": 400, "retired": 500, "eval": 600,
    }  # fmt: skip
    for one, other in itertools.combinations(sets, 2):
        assert not set(sets[one]) & set(sets[other]), (one, other)
    assert all(len(set(prompts)) == len(prompts) for prompts in sets.values())


def test_the_shipped_sets_are_the_generators() -> None:
    for name, rows in prompt_sets().items():
        assert rows == rows_of(name)
