"""Prompts of a reasoning-gym task: `reasoning_gym:chain_sum?size=2000&seed=1&min_terms=2`.

    python -m opd_mcp.planning.prompts.task_prompts FILE < TASK.json

The rows are made by that child process under limits of time, memory and disk: the package is heavy to import, and some
of its tasks search for long. Its last line of output is an error as JSON, or the number of rows that it wrote.
"""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from opd_mcp.devices.environment import bounded_environment
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, ResourceError, nearest

TASK_FILE = "task.json"
TASK_PREFIXES = ("reasoning_gym:", "reasoning-gym:")
DEFAULT_SIZE, MAX_SIZE = 500, 100_000
# reasoning-gym draws row i of seed s with s + i, so its neighbouring seeds share rows. Ours are this far apart, and the
# largest stays below 2**32, the limit of numpy's seeds.
SEED_DISTANCE, MAX_SEED = 100_000, 42_000
CHECKED_ROWS = 16
CPU_SECONDS, WALL_SECONDS = 60, 180.0
MEMORY_BYTES, FILE_BYTES = 4 << 30, 1 << 30
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", dict: "an object as JSON"}
_TASK = re.compile(r"reasoning[_-]gym:(?P<task>[A-Za-z0-9_]+)(?:\?(?P<query>.*))?", re.DOTALL)
_FORM = (
    "Give reasoning_gym:TASK?size=N&seed=S with the task's own parameters, e.g. "
    "reasoning_gym:chain_sum?size=2000&seed=1&min_terms=2."
)


@dataclass(frozen=True)
class TaskPrompts:
    """`size` rows of a task, drawn with `seed`; `parameters` are those of the task's configuration, as written."""

    task: str
    size: int = DEFAULT_SIZE
    seed: int = 0
    parameters: tuple[tuple[str, str], ...] = ()

    def key(self) -> str:
        """sha256 (hex) of what the rows follow from, the package's version included.

        Raises ResourceError `missing_package`.
        """
        if find_spec("reasoning_gym") is None:
            raise ResourceError(
                "missing_package",
                "Prompts of a reasoning-gym task need the package reasoning_gym, which is not installed here.",
                value=f"reasoning_gym:{self.task}",
                fix="Run: pip install 'opd-mcp[tasks]'. Or give the prompts as a file.",
            )
        return content_hash([metadata.version("reasoning-gym"), dataclasses.asdict(self)])


def is_task(reference: str) -> bool:
    """Whether a reference means prompts of a task rather than data."""
    return reference.startswith(TASK_PREFIXES)


def task_prompts(reference: str) -> TaskPrompts:
    """The rows that a reference means; raises ArgumentError `invalid_argument`."""
    match = _TASK.fullmatch(reference)
    try:
        pairs = parse_qsl((match["query"] if match else "") or "", keep_blank_values=True, strict_parsing=True)
    except ValueError:
        pairs = [] if match and not match["query"] else [("", "")]
    given = dict(pairs)
    if match is None or len(given) < len(pairs) or "" in given:
        raise ArgumentError("invalid_argument", "This names no task and its parameters.", value=reference, fix=_FORM)
    size = _whole("size", given.pop("size", str(DEFAULT_SIZE)), 1, MAX_SIZE)
    seed = _whole("seed", given.pop("seed", "0"), 0, MAX_SEED)
    return TaskPrompts(match["task"], size, seed, tuple(sorted(given.items())))


def _whole(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
        raise ArgumentError(
            "invalid_argument",
            f"{name} is a whole number from {least} to {most}.",
            value=text,
            fix=f"Give {name}={min(max(DEFAULT_SIZE, least), most) if name == 'size' else 1}, for example.",
        )
    return int(text)


def write_task_prompts(task: TaskPrompts, file: Path) -> None:
    """Write the rows as JSONL, and next to them `task.json`, what they were made from.

    A row has `id`, `prompt`, and as `answer` the entry that the grader `reasoning_gym` reads.

    Raises ArgumentError `invalid_argument` for an unknown task or parameter and for a task that fails, `too_slow` for
    rows that take too long.
    """
    command = [sys.executable, "-P", "-m", "opd_mcp.planning.prompts.task_prompts", str(file)]
    # Some tasks iterate over sets of words, whose order follows this seed.
    environment = {**bounded_environment(os.environ), "PYTHONHASHSEED": "0"}
    value = f"reasoning_gym:{task.task}?size={task.size}"
    try:
        done = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(task)),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
            check=False,
            env=environment,
        )
        ended = done.returncode >= 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:  # the kernel's limit on processor time ends the child with a signal
        raise ArgumentError(
            "too_slow",
            f"Making the rows took more than {CPU_SECONDS} s of processor time.",
            value=value,
            fix="Give a smaller size, or an easier configuration of the task.",
        )
    lines = done.stdout.splitlines()
    answer = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    if answer is None:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ArgumentError(
            "invalid_argument",
            f"reasoning-gym could not make the rows: {last[0][:300]}",
            value=value,
            fix="Change the task's parameters, or give another task.",
        )
    if "error" in answer:
        raise ArgumentError("invalid_argument", **answer["error"])
    made_from = {"package": "reasoning-gym", "version": metadata.version("reasoning-gym"), **dataclasses.asdict(task)}
    (file.parent / TASK_FILE).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


class _Refused(Exception):
    """What the child says to the parent: message, value, nearest and fix of an error."""

    def __init__(self, message: str, value: object, fix: str, near: list[str] | None = None) -> None:
        super().__init__(message)
        self.fields = {"message": message, "value": value, "fix": fix, "nearest": near or []}


def task_entries(task: TaskPrompts) -> Any:
    """reasoning-gym's data set of entries, made as they are read. Only for a child process."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.task not in DATASETS or task.task == "composite":
        near = nearest(task.task, sorted(DATASETS.keys() - {"composite"}))
        raise _Refused(f"reasoning-gym has no task {task.task[:100]!r}.", task.task, "Name one of its tasks.", near)
    fields = {field.name: field for field in dataclasses.fields(DATASETS[task.task][1])}
    known = sorted(fields.keys() - {"size", "seed"})
    values = {}
    for name, text in task.parameters:
        if name not in known:
            fix = f"The parameters of {task.task} are: {', '.join(known)}."
            raise _Refused(f"{task.task} has no parameter {name[:100]!r}.", name, fix, nearest(name, known))
        values[name] = _typed(name, text, _default(fields[name]))
    try:
        return reasoning_gym.create_dataset(task.task, seed=task.seed * SEED_DISTANCE, size=task.size, **values)
    except (AssertionError, ValueError, TypeError) as error:
        shown = "&".join(f"{name}={text}" for name, text in task.parameters)
        raise _Refused(f"{task.task} refuses these parameters: {str(error)[:300]}", shown, "Change them.") from error


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _typed(name: str, text: str, default: Any) -> Any:
    """A parameter's value, of the type of its default."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(default, str):
        return text
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        kind = _KINDS.get(type(default), "a list as JSON")
        shown = json.dumps(default, default=str)
        raise _Refused(f"The parameter {name} is {kind}.", text, f"Give a value such as {name}={shown[:200]}.")
    return value


def task_row(task: TaskPrompts, number: int, entry: dict[str, Any]) -> dict[str, str]:
    """An entry as our row."""
    gold = json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, ensure_ascii=False)
    return {"id": f"{task.task}-{task.seed}-{number}", "prompt": entry["question"], "answer": gold}


def _write_rows(task: TaskPrompts, file: Path) -> int:
    entries = task_entries(task)
    with file.open("w", encoding="utf-8") as output:
        for number in range(task.size):
            row = task_row(task, number, entry := entries[number])
            # Tuples become lists in JSON, after which a few tasks no longer know their own answer.
            known = number >= CHECKED_ROWS or entry["answer"] is None
            if not known and entries.score_answer(entry["answer"], json.loads(row["answer"])) < 1:
                message = f"The answers of {task.task} cannot be graded from a file."
                raise _Refused(message, task.task, "Give another task.")
            output.write(json.dumps(row, ensure_ascii=False) + "\n")
        output.flush()
        os.fsync(output.fileno())
    return task.size


def main() -> None:
    """Write the rows of the task on standard input to the file."""
    # The tasks' own output is discarded; standard output carries the answer only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    given = json.load(sys.stdin)
    task = TaskPrompts(**{**given, "parameters": tuple(map(tuple, given["parameters"]))})
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer: dict[str, Any] = {"rows": _write_rows(task, Path(sys.argv[1]))}
    except _Refused as refused:
        answer = {"error": refused.fields}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
