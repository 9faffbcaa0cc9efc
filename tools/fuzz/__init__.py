"""Random bad input from a seed: each must give a valid result or one clear error."""

import json
import sys
from pathlib import Path
from typing import Any


def printed(report: dict[str, Any], file: Path | None) -> int:
    """Print a report, its first problems to stderr, write it whole to `file` if given; 1 with problems, else 0."""
    problems = report["problems"]
    if file:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for problem in problems[:10]:
        print(json.dumps(problem), file=sys.stderr)
    print(json.dumps({**report, "problems": len(problems)}))
    return int(bool(problems))
