"""The engine against its peers in one interleaved run: medians of paired ratios, variant / ours.

Run: `python tools/bench/engine.py [--quick] [--case NAME …] [--json FILE]` (`make bench`; peers: `pip install
'.[bench]'`). Each round runs every variant of a case once, in an order that rotates; a ratio is taken within a round.
Peak memory is the growth of the resident set in a fresh process that runs one step; two such processes run at a time.
`--quick` takes fewer rows and two rounds, and measures two cases at a time, each on its own core. `--check` exits with
1 for a ratio below its bar. docs/performance.md explains the method and the bars.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.cases import CASES, Case, build_data, build_model, scoring_run, write_rollouts

sys.path.insert(0, os.environ.get("OPD_BENCH_PEERS", "."))
BARS = {
    ("vocab_152k", "naive_packed"): 1.6,
    ("vocab_152k", "naive_padded"): 1.9,
    ("vocab_152k", "trl_iwopd_stored_teacher"): 2.0,
    ("vocab_152k", "three_pass_recompute"): 3.5,
    ("vocab_152k", "torch_linear_cross_entropy"): 1.1,
    ("lora", "peft_padded"): 1.3,
    ("lora", "trl_peft"): 1.3,
    ("vocab_4k", "naive_padded"): 1.8,
    ("vocab_4k", "naive_packed"): 1.0,
    ("packing", "random_padding"): 2.0,
    ("packing", "dense_mask"): 1.5,
    ("generation", "hf_generate"): 1.3,
}
PEAK_BARS = {("vocab_152k", "naive_padded"): 4.0, ("lora", "peft_padded"): 2.0, ("lora", "trl_peft"): 2.0}
MOST_SCORING_GROWTH = 1.05
TOUCHING = Case(512, 64, 1, rows=2, quick_rows=2, shrink=64, budget=64)
Run = Callable[[], None]


def training_runs(case: str, *, quick: bool) -> dict[str, Run]:
    """One step of every variant that is installed, by name, on one set of rows; on one model, but for adapters."""
    from tools.bench.peers import ADAPTED, BODY, TRAINING, adapted_models

    plain, data = build_model(CASES[case]), build_data(CASES[case], quick=quick)
    steps = {"packing": BODY, "lora": ADAPTED}.get(case, TRAINING)
    installed = {name: step for name, step in steps.items() if all(map(_has, PACKAGES & set(name.split("_"))))}
    models = adapted_models(plain, list(installed), CASES[case]) if case == "lora" else dict.fromkeys(installed, plain)

    def run_of(name: str) -> Run:
        def run() -> None:
            models[name].zero_grad(set_to_none=True)
            installed[name](models[name], data, CASES[case])

        return run

    return {name: run_of(name) for name in installed}


PACKAGES = {"trl", "peft"}
"""What a variant needs whose name has it."""


def _has(package: str) -> bool:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import_module(package)
    except ImportError:
        print(f"{package} is not installed: its variants are left out (pip install '.[bench]')", file=sys.stderr)
        return False
    return True


def generation_runs(*, quick: bool) -> dict[str, Run]:
    """Bulk sampling by our generator and by HF `generate`."""
    from tools.bench.generation import generation_variants

    return generation_variants(quick=quick)


def runs_of(case: str, *, quick: bool) -> dict[str, Run]:
    """The variants of a case."""
    return generation_runs(quick=quick) if case == "generation" else training_runs(case, quick=quick)


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round; other load on the machine hardly counts."""
    names, seconds = list(runs), {name: [] for name in runs}
    runs["ours"]()
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - started)
    return seconds


def time_ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over the rounds of variant / ours."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds["ours"], strict=True))
        for name, values in seconds.items()
        if name != "ours"
    }


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def growth(run: Run) -> int:
    """Bytes by which a run makes this process grow."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts here
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def print_peaks(case: str, variants: list[str], *, quick: bool, scratch: Path | None) -> None:
    """Print the growth of each variant, each in its own process, forked from this one, which has run none of them."""
    if case == "scoring_memory":
        assert scratch is not None
        print(json.dumps([growth(scoring_run(scratch, name)) for name in variants]))
        return
    _inherited.update(runs_of(case, quick=quick))
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(_growth_of, variants, chunksize=1)))


# forked processes inherit it: closures cannot be sent to them
_inherited: dict[str, Run] = {}


def _growth_of(variant: str) -> int:
    _touch_libraries()
    return growth(_inherited[variant])


def _touch_libraries() -> None:
    """Touch the pages of torch's code that every variant needs: they count again in a forked process."""
    from tools.bench.peers import TRAINING

    TRAINING["ours"](build_model(TOUCHING), build_data(TOUCHING, quick=True), TOUCHING)


def peaks(case: str, variants: list[str], *, quick: bool, scratch: Path | None = None) -> list[int]:
    """The growth of each variant in bytes, measured from a fresh process."""
    command = [sys.executable, __file__, "--peaks", case, *variants]
    command += ["--quick"] * quick + (["--scratch", str(scratch)] if scratch else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def case_rows(case: str, rounds: int, only: list[str] | None, *, quick: bool) -> list[dict[str, object]]:
    """The case's rows of the report."""
    if case == "scoring_memory":
        with tempfile.TemporaryDirectory() as scratch:
            write_rollouts(Path(scratch), rows=256 if quick else 1024)
            few, many = (
                peaks(case, [name], quick=quick, scratch=Path(scratch))[0] for name in ("ours", "ours_10x_rows")
            )
        return [{"case": case, "variant": "ours_10x_rows", "time_ratio": None, "peak_ratio": many / few}]
    runs = runs_of(case, quick=quick)
    if only is not None:
        runs = {name: run for name, run in runs.items() if name in ("ours", *only)}
    ratios = time_ratios(interleaved(runs, rounds))
    grown = dict(zip(runs, peaks(case, list(runs), quick=quick), strict=True))
    return [
        {
            "case": case,
            "variant": name,
            "time_ratio": ratio,
            "peak_ratio": grown[name] / grown["ours"],
        }
        for name, ratio in ratios.items()
    ]


def misses(rows: list[dict]) -> list[str]:
    """One line per ratio that misses its bar."""
    found = []
    for row in rows:
        key = (row["case"], row["variant"])
        bar = 1.0 if row["case"] == "deep" else BARS.get(key)
        if bar is not None and row["time_ratio"] < bar:
            found.append(f"{key}: {row['time_ratio']:.2f} is below {bar}")
        if key in PEAK_BARS and row["peak_ratio"] < PEAK_BARS[key]:
            found.append(f"{key}: peak {row['peak_ratio']:.2f} is below {PEAK_BARS[key]}")
        if row["case"] == "scoring_memory" and row["peak_ratio"] > MOST_SCORING_GROWTH:
            found.append(f"{key}: peak {row['peak_ratio']:.3f} is above {MOST_SCORING_GROWTH}")
    return found


def shown(rows: list[dict]) -> list[dict]:
    """The same rows, after printing them."""
    for row in rows:
        both = (row["time_ratio"], row["peak_ratio"])
        texts = ["      -" if ratio is None else f"{ratio:7.2f}" for ratio in both]
        print(f"{row['case']:15} {row['variant']:28} time {texts[0]}  peak {texts[1]}", flush=True)
    return rows


def side_by_side(cases: list[str], rounds: int, only: list[str] | None) -> list[dict]:
    """The rows of quick cases, each measured in its own process, two at a time."""

    def measured(case: str) -> list[dict]:
        with tempfile.NamedTemporaryFile(suffix=".json") as report:
            command = [
                sys.executable,
                __file__,
                "--quick",
                "--case",
                case,
                "--rounds",
                str(rounds),
                "--json",
                report.name,
            ]
            subprocess.run([*command, *(["--variant", *only] if only else [])], check=True)
            return json.loads(Path(report.name).read_text(encoding="utf-8"))["rows"]

    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(measured, cases) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, "scoring_memory", "generation"]
    parser.add_argument("--case", nargs="*", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="fewer rows, two rounds, two cases at a time")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--variant", nargs="*", help="only these, next to ours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 for a ratio below its bar")
    parser.add_argument("--peaks", nargs="+", metavar="CASE VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peaks:
        case, *variants = arguments.peaks
        print_peaks(case, variants, quick=arguments.quick, scratch=arguments.scratch)
        return
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    if arguments.quick and len(arguments.case) > 1:
        rows = side_by_side(arguments.case, rounds, arguments.variant)
    else:
        rows = [
            row
            for case in arguments.case
            for row in shown(case_rows(case, rounds, arguments.variant, quick=arguments.quick))
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    missed = misses(rows)
    for line in missed:
        print(f"below its bar: {line}")
    sys.exit(bool(missed) and arguments.check)


if __name__ == "__main__":
    main()
