"""The grading child: one process that grades many answers, read as JSON lines, each under the kernel's own limits.

    python -m opd_mcp.grading.child NAME CPU_SECONDS MEMORY_BYTES [PATTERN]

The kernel ends this process when one answer takes too much processor time, even inside a big power that Python cannot
interrupt; the parent then starts another. It says `ready` once it has imported what it needs.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable

from opd_mcp.grading.grade import Grade

Scorer = Callable[[str, str], Grade]


def scorer(name: str, pattern: str | None) -> Scorer:
    """The function that grades, with its libraries imported."""
    if name == "math":
        import math_verify  # noqa: F401

        from opd_mcp.grading.equivalence import verified

        return verified
    if name == "reasoning_gym":
        import reasoning_gym  # noqa: F401

        from opd_mcp.grading.tasks import scored

        return scored
    assert name == "regex", name
    from opd_mcp.grading.patterns import by_pattern, compiled_pattern

    compiled = compiled_pattern(pattern)
    return lambda response, gold: by_pattern(response, gold, compiled)


def graded(score: Scorer, response: str, gold: str) -> dict[str, object]:
    """The grade as JSON-ready values; a scorer that fails has not found the answer right."""
    try:
        grade = score(response, gold)
    except Exception as error:
        return {"correct": False, "extracted": None, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"correct": grade.correct, "extracted": grade.extracted}


def main() -> None:
    """Grade lines of [response, gold] until there are no more."""
    name, cpu_seconds, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    # What libraries print goes where nobody reads; answers have the first standard output for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    score = scorer(name, sys.argv[4] if len(sys.argv) > 4 else None)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        response, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal's default is to end the process
        reply = graded(score, response, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
