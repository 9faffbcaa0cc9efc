"""Measure every claim about the method on the embedded tasks, and write `docs/evidence.json`, `.md` and the figures.

    python tools/evidence/measure.py --work DIR
    python tools/evidence/measure.py --work DIR --quick
    python tools/evidence/measure.py --work DIR --only-write

Each row (task, arm, seed) is kept below DIR as soon as it is measured, and an interrupted call goes on from there; runs
find what earlier ones made. Two arms are measured at a time, one thread each. `--quick` takes two seeds of one task
with a few steps: it shows that the command works, and writes below DIR instead of `docs/`. `--only-write` measures
nothing and writes from the rows that are kept. The figures need matplotlib, the arms `trl_live*` TRL (both in the extra
`evidence`); they are left out without it. An arm that fails is named at the end, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.demo import TaskName
from opd_mcp.devices.settings import JobSettings
from opd_mcp.identity.files import write_atomic
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace
from tools import EXAMPLE, ROOT
from tools.evidence.arms import ARMS, MORE, Bench, Row
from tools.evidence.claims import claims_of, figures_of
from tools.evidence.document import document, with_readme_line
from tools.evidence.figures import drawings

Measured = dict[str, dict[str, dict[int, Row]]]
TASKS: tuple[TaskName, ...] = ("arithmetic", "chain_sum")
"""By length, the shorter one first."""
SEEDS = (1, 2, 3, 4, 5)
TRL_SEEDS = 3
QUICK_ARMS = ("base", "sft", "lightning_sampled", "live_sampled", "opsa", "rounds_2")


def measured(benches: Mapping[str, Bench], arms: Sequence[str], seeds: Sequence[int]) -> tuple[Measured, list[str]]:
    """The rows by task, arm and seed, and what failed.

    Two parts at a time, so that no core waits: a part is a seed of a task with the arms of the comparison, or with the
    others, and measures one arm after the other. Parts of the longer task come first.
    """
    rows: Measured = {task: {arm: {} for arm in arms} for task in benches}
    failed: list[str] = []

    def part(bench: Bench, some: Sequence[str], place: int) -> None:
        seed = seeds[place]
        for arm in some:
            if arm.startswith("trl_live") and place >= TRL_SEEDS:
                continue
            try:
                found = bench.rows(arm, seed)
            except Exception as error:  # one arm must not end a night's work
                failed.append(f"{bench.task}, {arm}, seed {seed}: {type(error).__name__}: {error}")
                continue
            if arm in found:
                rows[bench.task][arm][seed] = found[arm]
                row = found[arm]
                text = f"{row.accuracy:.3f}, KL {row.reverse_kl:.3f}, {row.processor_seconds:.1f} s"
                print(f"{bench.task}, seed {seed}, {arm}: {text}", flush=True)

    groups = [[arm for arm in arms if arm in group] for group in (ARMS, MORE)]
    longest_first = sorted(benches.values(), key=lambda bench: TASKS.index(bench.task), reverse=True)
    with ThreadPoolExecutor(2) as pool:
        works = [
            pool.submit(part, bench, some, place)
            for some in groups
            for bench in longest_first
            for place in range(len(seeds))
        ]
        for work in works:
            work.result()
    return rows, failed


def kept(bench: Bench, arms: Sequence[str], seeds: Iterable[int]) -> dict[str, dict[int, Row]]:
    """The rows by arm and seed that earlier calls kept, with the drift where the workspace still has the training."""
    rows: dict[str, dict[int, Row]] = {arm: {} for arm in arms}
    drifts = bench.drifts()
    for arm in arms:
        for seed in seeds:
            if row := (bench.kept(arm, seed) or {}).get(arm):
                drift = row.drift if row.drift is not None else drifts.get((row.accuracy, row.reverse_kl))
                rows[arm][seed] = replace(row, drift=drift)
    return rows


def written(evidence: dict[str, Any], folder: Path, command_line: str) -> None:
    """Write the JSON, the page and the figures; in the repository's own documents the README's line too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "evidence.json", json.dumps(evidence, indent=1) + "\n")
    drawn: dict[str, str] = {}
    if find_spec("matplotlib") is None:
        print("No figures: matplotlib is not installed (extra 'evidence').", file=sys.stderr)
    else:
        for task, figures in evidence["tasks"].items():
            drawn |= {f"{task}-{name}": text for name, text in drawings(task, figures["arms"]).items()}
    for name, text in drawn.items():
        write_atomic(folder / f"evidence-{name}.svg", text)
    write_atomic(folder / "evidence.md", document(evidence, command_line, drawn))
    if folder.resolve() == ROOT / "docs":
        readme = ROOT / "README.md"
        write_atomic(readme, with_readme_line(readme.read_text("utf-8"), evidence))


def service_of(work: Path, settings: JobSettings | None = None) -> JobService:
    """A service over a workspace below the folder, with leases of its own."""
    own = settings or JobSettings(lease_folder=work / "leases", cpu_slots=2)
    return JobService(Workspace(work / "home"), AllowedRoots([EXAMPLE.parent, work]), own)


def main(arguments: Sequence[str] | None = None, settings: JobSettings | None = None) -> int:
    """Measure, write, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="workspace, kept rows and TRL's students")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *MORE), help="default: all, or those of the quick part")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only-write", action="store_true", help="measure nothing, write from the kept rows")
    options = parser.parse_args(arguments)
    work, docs, tasks, seeds = options.work.absolute(), options.docs, options.tasks, options.seeds
    if options.quick:
        tasks, seeds, docs = ["arithmetic"], options.seeds[:2], work / "docs"
    arms = options.arms or list(QUICK_ARMS if options.quick else (*ARMS, *MORE))
    if find_spec("trl") is None and not options.only_write:
        arms = [arm for arm in arms if not arm.startswith("trl_live")]
    service = service_of(work, settings)
    benches = {task: Bench(task, service, work, options.quick) for task in tasks}
    if options.only_write:
        rows, failed = {task: kept(bench, arms, seeds) for task, bench in benches.items()}, []
    else:
        rows, failed = measured(benches, arms, seeds)
    by_task = {task: figures_of(rows[task]) for task in tasks}
    evidence: dict[str, Any] = {"tasks": by_task, "claims": claims_of(by_task)}
    if options.quick:
        evidence["quick"] = True
    command = "python tools/evidence/measure.py --work DIR" + (" --quick" if options.quick else "")
    written(evidence, docs, command)
    for problem in failed:
        print(f"FAILED {problem}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
