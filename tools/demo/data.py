"""Write the prompt sets of `examples/arithmetic` and the student's initial weights.

    python tools/demo/data.py                       # prompt sets
    python tools/demo/data.py --student-seed 3      # and the student with this initialisation

All sets are disjoint. `eval.jsonl` is for final results only; choices are made on `tune.jsonl`, whose last 500 prompts
were an evaluation set until its results influenced a choice.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import EXAMPLE
from tools.demo.task import answer, build_tokenizer, model_config, random_problem

SETS = {"sft": 350, "opd": 3200, "tune": 900}
SETS_SEED = 20260413
# drawn by its own generator, after student and settings were fixed
FINAL_SET, FINAL_SIZE, FINAL_SEED = "eval", 600, 20261124
STEPS = (2, 6)


def prompt_sets() -> dict[str, list[dict[str, str]]]:
    """The rows of each set by its name; no prompt is in two sets."""
    seen: set[str] = set()
    generator = random.Random(SETS_SEED)
    sets = {name: _drawn(name, size, generator, seen) for name, size in SETS.items()}
    return sets | {FINAL_SET: _drawn(FINAL_SET, FINAL_SIZE, random.Random(FINAL_SEED), seen)}


def write_prompt_sets() -> None:
    """Write all sets as JSONL."""
    for name, rows in prompt_sets().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (EXAMPLE / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _drawn(name: str, size: int, generator: random.Random, seen: set[str]) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    while len(rows) < size:
        prompt = random_problem(generator, STEPS)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"id": f"{name}-{len(rows):04d}", "prompt": prompt, "answer": answer(prompt)})
    return rows


def write_student(seed: int, output: Path) -> None:
    """Write untrained weights of this initialisation, with the tokenizer and the command that makes them."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = model_config(
        hidden_size=64, layers=2, intermediate_size=192, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id
    )
    Qwen3ForCausalLM(config).save_pretrained(output)
    tokenizer.save_pretrained(output)
    made_by = {
        "command": f"python tools/demo/data.py --student-seed {seed}",
        "seed": seed,
        "torch": torch.__version__,
    }
    (output / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-seed", type=int)
    arguments = parser.parse_args()
    write_prompt_sets()
    if arguments.student_seed is not None:
        write_student(arguments.student_seed, EXAMPLE / "student")


if __name__ == "__main__":
    main()
