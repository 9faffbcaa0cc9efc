"""The tables of docs/results.md from the demo's JSON files, and whether every bar was met.

    for seed in 11 12 13; do opd-mcp demo --seed $seed --json demo-$seed.json; done
    python tools/docs/demo_table.py demo-11.json demo-12.json demo-13.json

All files are of one task. Exits with 1 when a bar was missed in any file.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


Arms = dict[str, dict[str, Any]]
Bars = dict[str, tuple[Callable[[Arms], float], str, Callable[[float], bool]]]
BARS: Bars = {
    "SFT accuracy": (lambda a: a["sft"]["accuracy"], "0.25 to 0.60", lambda v: 0.25 <= v <= 0.60),
    "lightning sampled, accuracy": (lambda a: a["lightning_sampled"]["accuracy"], "≥ 0.70", lambda v: v >= 0.70),
    "lightning sampled − SFT": (
        lambda a: a["lightning_sampled"]["accuracy"] - a["sft"]["accuracy"],
        "≥ 0.25",
        lambda v: v >= 0.25,
    ),
    "reverse KL, lightning sampled / SFT": (
        lambda a: a["lightning_sampled"]["reverse_kl"] / a["sft"]["reverse_kl"],
        "≤ 0.40",
        lambda v: v <= 0.40,
    ),
    "lightning top-8, accuracy": (lambda a: a["lightning_topk"]["accuracy"], "≥ 0.88", lambda v: v >= 0.88),
    "a lightning step / a live step": (
        lambda a: a["lightning_sampled"]["seconds_per_step"] / a["live"]["seconds_per_step"],
        "≤ 0.50",
        lambda v: v <= 0.50,
    ),
    "other style: SFT − distilled": (
        lambda a: a["sft_other_style"]["accuracy"] - a["lightning_other_style"]["accuracy"],
        "≥ 0.20",
        lambda v: v >= 0.20,
    ),
}


def gap_closed(arms: Arms, arm: str) -> float:
    """The share of the gap in accuracy between SFT student and teacher that an arm closed."""
    sft, teacher = arms["sft"]["accuracy"], arms["teacher"]["accuracy"]
    return (arms[arm]["accuracy"] - sft) / (teacher - sft)


CHAIN_SUM_BARS: Bars = {
    "lightning top-8, gap closed": (lambda a: gap_closed(a, "lightning_topk"), "≥ 0.50", lambda v: v >= 0.50),
    "live, gap closed": (lambda a: gap_closed(a, "live"), "–", lambda v: True),
    "reverse KL, lightning top-8 / SFT": (
        lambda a: a["lightning_topk"]["reverse_kl"] / a["sft"]["reverse_kl"],
        "≤ 0.50",
        lambda v: v <= 0.50,
    ),
    "a lightning step / a live step": (
        lambda a: a["lightning_topk"]["seconds_per_step"] / a["live"]["seconds_per_step"],
        "≤ 0.50",
        lambda v: v <= 0.50,
    ),
}
TASK_BARS = {"arithmetic": BARS, "chain_sum": CHAIN_SUM_BARS}


def arms_table(results: list[dict[str, Any]]) -> list[str]:
    """One row per arm, one column per seed: accuracy with its interval, and reverse KL."""
    lines = ["| arm | " + " | ".join(f"seed {r['seed']}" for r in results) + " |", "|---" * (len(results) + 1) + "|"]
    for arm in results[0]["arms"]:
        cells = [_quality(result["arms"][arm]) for result in results]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def cost_table(results: list[dict[str, Any]]) -> list[str]:
    """Seconds of training, per step, and in total, for each seed."""
    lines = ["| arm | steps | training, s | a step, s | in all, s |", "|---|---|---|---|---|"]
    for arm, first in results[0]["arms"].items():
        if first["steps"]:
            columns = [
                " / ".join(format(result["arms"][arm][name], form) for result in results)
                for name, form in (("seconds", ".1f"), ("seconds_per_step", ".3f"), ("seconds_total", ".1f"))
            ]
            lines.append(f"| {arm} | {first['steps']} | " + " | ".join(columns) + " |")
    return lines


def bars_table(results: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Every bar with each seed's value, and whether all were met."""
    lines, met = ["| bar | wanted | reached |", "|---|---|---|"], True
    task = results[0].get("task", "arithmetic")
    for name, (value, wanted, holds) in TASK_BARS[task].items():
        reached = [value(result["arms"]) for result in results]
        met &= all(map(holds, reached))
        cells = [format(number, ".3f") + ("" if holds(number) else " (missed)") for number in reached]
        lines.append(f"| {name} | {wanted} | {' / '.join(cells)} |")
    walls = [result["wall_seconds"] for result in results]
    if task != "arithmetic":
        lines.append(f"| whole demo | – | {' / '.join(f'{wall:.0f} s' for wall in walls)} |")
        return lines, met
    refused = [result["consistency_guard"]["refused"] for result in results]
    lines.append(f"| consistency guard | refused | {' / '.join('refused' if r else 'not refused' for r in refused)} |")
    spent = [f"{wall:.0f} s" + ("" if wall <= 240 else " (missed)") for wall in walls]
    lines.append(f"| whole demo | ≤ 240 s | {' / '.join(spent)} |")
    return lines, met and all(refused) and max(walls) <= 240


def _quality(arm: dict[str, Any]) -> str:
    low, high = arm["accuracy_ci"]
    return f"{arm['accuracy']:.3f} [{low:.3f}, {high:.3f}]; {arm['reverse_kl']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().files]
    bars, met = bars_table(results)
    for table in (bars, arms_table(results), cost_table(results)):
        print("\n".join(table) + "\n")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
