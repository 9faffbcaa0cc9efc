"""Grades the project's own pairs of answers and says how many grades are right, and how many hang.

    python tools/bench/graders.py [--json FILE] [--all]

A pair is an expected answer, a response, the grader's name ("auto": chosen from that answer) and whether they are
equal; a long response is written as [[text, times], …]. Some are written to hang a careless grader (`may_hang`).
A hang is a grade that takes much longer than the limits that the grader promises to keep.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.grading.child import AnswerLimits
from opd_mcp.grading.golds import chosen_grader
from opd_mcp.grading.graders import Grader, grader_for

PAIRS = Path(__file__).resolve().parent / "grader_pairs.jsonl"
LIMITS = AnswerLimits(cpu_seconds=3.0)


def graded_pairs(file: Path) -> list[dict[str, object]]:
    """Every pair with its grade: `right`, `timed_out`, `seconds`."""
    graders: dict[str, Grader] = {}
    results = []
    for line in file.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        name = chosen_grader([pair["gold"]])[0] if pair["grader"] == "auto" else pair["grader"]
        grader = graders.get(name) or graders.setdefault(name, grader_for(name, limits=LIMITS))
        if isinstance(pair["response"], list):
            pair["response"] = "".join(text * times for text, times in pair["response"])
        started = time.perf_counter()
        grade = grader.grade(pair["response"], pair["gold"])
        seconds = time.perf_counter() - started
        graded = {"right": grade.correct == pair["equal"], "extracted": grade.extracted, "timed_out": grade.timed_out}
        results.append({**pair, **graded, "seconds": seconds})
    for grader in graders.values():
        grader.close()
    return results


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all", action="store_true", help="print every pair, not only those graded wrong")
    arguments = parser.parse_args()
    results = graded_pairs(PAIRS)
    for result in results:
        if arguments.all or not result["right"]:
            said = "right" if result["right"] else "WRONG"
            shown = {name: str(result[name])[:80] for name in ("grader", "gold", "response", "extracted")}
            print(f"{said} {result['seconds']:.2f} s equal={result['equal']} {shown}")
    figures = {
        "pairs": len(results),
        "right": sum(bool(result["right"]) for result in results),
        "hangs": sum(result["seconds"] > 2 * LIMITS.cpu_seconds + 10 for result in results),
        "meant_to_hang": sum(bool(result.get("may_hang")) for result in results),
        "stopped_at_their_limit": sum(bool(result["timed_out"]) for result in results),
        "seconds": round(sum(float(result["seconds"]) for result in results), 1),
    }
    text = json.dumps(figures)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
