"""Time and memory of a plan over a million prompts: our own fields, GSM8K's and chats, in JSONL, Parquet and CSV.

    python tools/bench/data.py [--rows 1000000] [--json FILE]

Each case is a fresh process that makes one whole plan: prompts read, hashed, compared with 1,000 evaluation prompts,
checked for copies and length, phases keyed, costs estimated. `plan_cpu_s` is its processor time, which other programs
disturb less. `read_ratio` is the time of the pass over the prompts in units of a bare `json.loads` of each line, both
as processor time in that process, so that it can be compared between machines. Exits with 1 above a bar: 5 s and
500 MiB for a million rows, on two idle cores.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import EXAMPLE

SECONDS, BYTES = 5.0, 500 << 20
EVALUATION_ROWS = 1000
CASES = ("prompt.jsonl", "prompt.parquet", "gsm8k.jsonl", "gsm8k.parquet", "gsm8k.csv", "messages.jsonl")
NAMES = ("Natalia", "Weng", "Betty", "Julie", "Zoë", "Ken", "Toulouse", "Mark")


def rows_of(shape: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Word problems as long as GSM8K's, one in eight of them not ASCII."""
    random = Random(seed)
    for number in range(count):
        name, a, b = random.choice(NAMES), random.randrange(10_000), random.randrange(100)
        question = (
            f"{name} sold clips to {a} friends in April, and then {b} times as many clips in May (order {number}). "
            f"Each clip costs {b} cents, and half of the money is saved. How much did {name} save in both months?"
        )
        if shape == "prompt":
            yield {"prompt": question, "answer": str(a * b)}
        elif shape == "messages":
            system = {"role": "system", "content": "You are a careful helper."}
            yield {"messages": [system, {"role": "user", "content": question}], "answer": str(a * b)}
        else:
            steps = f"{name} sold {a}*{b} = <<{a}*{b}={a * b}>>{a * b} clips in May, and saves half of what they cost."
            yield {"question": question, "answer": f"{steps}\n#### {a * b}"}


def write(path: Path, count: int, seed: int) -> None:
    """The prompts of one case."""
    shape, kind = path.name.split(".")
    if kind == "jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(shape, count, seed))
        return
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["question", "answer"])
            table.writeheader()
            table.writerows(rows_of(shape, count, seed))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows_of(shape, count, seed))), path, row_group_size=100_000)


def peak_bytes() -> int:
    """The peak resident memory of this process; `ru_maxrss` would count what its parent held at the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measured(prompts: Path, evaluation: Path, home: Path) -> dict[str, Any]:
    """One plan in this process: seconds, peak memory, and the pass over the prompts next to bare decoding."""
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.identity.data.scan import scan_prompts
    from opd_mcp.schemas.requests import PlanDistillation
    from opd_mcp.service import JobService
    from opd_mcp.store.roots import AllowedRoots
    from opd_mcp.store.workspace import Workspace

    service = JobService(Workspace(home), AllowedRoots([prompts.parent, EXAMPLE]), JobSettings())
    arguments = PlanDistillation(
        student=str(EXAMPLE / "student"),
        teacher=str(EXAMPLE / "teacher"),
        prompts=str(prompts),
        eval_prompts=str(evaluation),
    )
    started, cpu = time.perf_counter(), time.process_time()
    plan = service.plan(arguments)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_bytes()
    started = time.process_time()
    scan_prompts(prompts, long_bytes=2048)
    scan = time.process_time() - started
    report = {
        "rows": plan.hygiene.prompts,
        "plan_s": round(seconds, 2),
        "plan_cpu_s": round(cpu, 2),
        "peak_bytes": peak,
        "scan_cpu_s": round(scan, 2),
    }
    if prompts.suffix == ".jsonl":
        started = time.process_time()
        with prompts.open("rb") as file:
            for line in file:
                json.loads(line)
        report["read_ratio"] = round(scan / (time.process_time() - started), 2)
    return report


def main() -> int:
    """Measures every case; 1 when one is above a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(*arguments.case)))
        return 0
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            data = Path(folder, name)
            write(data, arguments.rows, seed=1)
            held_out = Path(folder, "held-out")
            held_out.mkdir(exist_ok=True)
            write(held_out / name, EVALUATION_ROWS, seed=2)
            command = [sys.executable, __file__, "--case", str(data), str(held_out / name), str(Path(folder, "home"))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            report[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, report[name], flush=True)
            data.unlink()
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    share = arguments.rows / 1_000_000
    above = [name for name, case in report.items() if case["plan_s"] > SECONDS * share or case["peak_bytes"] > BYTES]
    print(f"above a bar: {', '.join(above)}" if above else "all below the bars")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
