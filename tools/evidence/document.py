"""`docs/evidence.md` and the README's line about it, written from `docs/evidence.json` alone."""

import re
from collections.abc import Collection, Mapping, Sequence
from math import inf
from statistics import mean
from typing import Any

from opd_mcp.grading.paired import mean_over_seeds
from tools.evidence.arms import ARMS, DRIFT, MORE, OBJECTIVES, ONE_TASK

SIGNS = {"reproduced": "reproduced", "refuted": "**refuted**", "out of reach": "out of reach"}
HEAD = """# Evidence

Made by one command, which goes on where it stopped:

    python tools/evidence/measure.py --work DIR

Greedy accuracy on `eval.jsonl`, reverse KL to the teacher in nats per token on fresh samples, and processor seconds of
the workers, all stages up to the student, SFT included. Every arm of a task takes the same steps with the same batch
and seeds; `tools/evidence/arms.py` says what an arm changes. Differences are paired by seed, with 95 % t-intervals.
The rows of 2026-11-28 and 29 are of two cores that other work used too (torch 2.13, one thread): their seconds compare
arms of one seed, and vary between seeds with that work.

A claim is *reproduced* where its interval says so, *refuted* where it says the opposite, and *out of reach* where these
runs cannot decide it. Two arms count as alike where the interval lies above −0.05 in accuracy; that margin was fixed
before anything was measured. The figures are in [evidence.json](evidence.json). With `--only-write` the command
measures nothing and writes this page from the rows that are kept in DIR.
"""
GRID: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("own | own", ("live_sampled", "lightning_sampled", "repaired_consistent")),
    ("own | other style", ("live_swapped", "swapped", "repaired_swapped")),
    ("other style | own", ("live_mismatched", "mismatched", "repaired")),
    ("other style | other style", ("live_other", "other", "repaired_other")),
)
ALTS = {
    "accuracy": "accuracy by arm",
    "cost": "accuracy over processor seconds",
    "rounds": "accuracy by the number of rounds",
    "horizon": "accuracy by the horizon",
    "drift": "accuracy over the effective sample share",
}
README_LINE = re.compile(r"<!-- evidence -->.*?<!-- /evidence -->", re.DOTALL)


def document(evidence: Mapping[str, Any], command_line: str, drawn: Collection[str] = ()) -> str:
    """The page: of each task tables and the figures of `drawn` (TASK-NAME), then a paragraph for every claim."""
    lines = [HEAD]
    if evidence.get("quick"):
        lines.append("**Figures of the quick part: they show that the command works, and nothing else.**\n")
    for task, figures in evidence["tasks"].items():
        lines += [f"## {task}", "", *task_part(task, figures, drawn), ""]
    lines += ["## Claims", "", *claim_paragraphs(evidence["claims"])]
    return "\n".join([*lines, f"Made by `{command_line}`.", ""])


def task_part(task: str, figures: Mapping[str, Any], drawn: Collection[str]) -> list[str]:
    """All tables of a task, each under its figure, and which arms were not measured."""
    arms, paired = figures["arms"], figures["paired"]
    if not arms:
        return ["Not measured."]
    missing = [arm for arm in (*ARMS, *MORE) if arm not in arms and (task == "arithmetic" or arm not in ONE_TASK)]
    lines = [*_picture(task, "accuracy", drawn), *arm_table(arms), ""]
    if missing:
        lines += [f"Not measured: {', '.join(f'`{arm}`' for arm in missing)}.", ""]
    lines += [*pair_table(paired), "", "### Cost", "", *_picture(task, "cost", drawn)]
    lines += [*shared_table(figures["students_per_cache"]), "", "### Rounds and horizon", ""]
    lines += ["With as many rounds as steps every step has rollouts of its own: that is live OPD, the last point.", ""]
    lines += [*_picture(task, "rounds", drawn), *_picture(task, "horizon", drawn)]
    lines += ["### Objectives", "", *objective_table(arms, paired), ""]
    if task == "arithmetic":
        lines += ["### The consistency grid", "", *grid_table(arms), ""]
    if drifts := drift_table(arms):
        lines += ["### Drift against quality", "", *_picture(task, "drift", drawn), *drifts]
    return lines


def _picture(task: str, name: str, drawn: Collection[str]) -> list[str]:
    return [f"![{ALTS[name]}](evidence-{task}-{name}.svg)", ""] if f"{task}-{name}" in drawn else []


def arm_table(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per arm: means with their t-intervals over seeds."""
    lines = ["| arm | seeds | accuracy | reverse KL | processor seconds |", "|---|---|---|---|---|"]
    for name, arm in arms.items():
        cells = [with_interval(arm["accuracy"], 3, 1), with_interval(arm["reverse_kl"], 3)]
        lines.append(f"| `{name}` | {len(arm['seeds'])} | {' | '.join(cells)} | {mean(arm['processor_seconds']):.1f} |")
    return lines


def with_interval(values: Sequence[float], digits: int, highest: float = inf) -> str:
    """The mean, with its t-interval where there are two values or more, cut to what it can be: 0 to the highest."""
    estimate = mean_over_seeds(values)
    if estimate is None:
        return f"{mean(values):.{digits}f}"
    return f"{estimate.value:.{digits}f} [{max(estimate.low, 0):.{digits}f}, {min(estimate.high, highest):.{digits}f}]"


def pair_table(paired: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per pair of arms: differences with their intervals."""
    lines = ["| difference | seeds | accuracy | reverse KL | processor seconds |", "|---|---|---|---|---|"]
    for name, pair in paired.items():
        cells = [
            signed(pair[measure], digits)
            for measure, digits in (("accuracy", 3), ("reverse_kl", 3), ("processor_seconds", 1))
        ]
        lines.append(f"| {name.replace(' - ', ' − ')} | {len(pair['seeds'])} | {' | '.join(cells)} |")
    return lines


def signed(estimate: Sequence[float], digits: int) -> str:
    """A difference [value, low, high] with its signs."""
    value, low, high = (f"{number:+.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"


def shared_table(shared: Mapping[str, Sequence[float]]) -> list[str]:
    """Processor seconds per student beyond the SFT, by the number of students that share a cache."""
    lines = ["| processor seconds per student, without the SFT | 1 student | 2 | 5 |", "|---|---|---|---|"]
    return lines + [f"| `{arm}` | {' | '.join(f'{value:.1f}' for value in values)} |" for arm, values in shared.items()]


def objective_table(arms: Mapping[str, Any], paired: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per objective that is off by default: what it does to the arm that differs in nothing else."""
    lines = ["| objective | against | seeds | accuracy | it |", "|---|---|---|---|---|"]
    for arm, base in OBJECTIVES.items():
        pair = paired.get(f"{arm} - {base}")
        if pair is None:
            lines.append(f"| `{arm}` | `{base}` | {len(arms.get(arm, {}).get('seeds', ()))} | not measured | |")
            continue
        _, low, high = pair["accuracy"]
        word = "gains" if low > 0 else "**loses**" if high < 0 else "shows no difference beyond chance"
        lines.append(f"| `{arm}` | `{base}` | {len(pair['seeds'])} | {signed(pair['accuracy'], 3)} | {word} |")
    return lines


def grid_table(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy by the SFT's teacher, the distillation's teacher, and the way of the distillation."""
    lines = ["| SFT teacher | OPD teacher | live | lightning | repaired lightning |", "|---|---|---|---|---|"]
    for name, cells in GRID:
        shown = [with_interval(arms[arm]["accuracy"], 3, 1) if arm in arms else "not measured" for arm in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def drift_table(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The effective sample share at the end of each training that told it, next to its accuracy."""
    lines = [
        f"| `{name}` | {with_interval(arm[DRIFT], 3, 1)} | {with_interval(arm['accuracy'], 3, 1)} |"
        for name, arm in arms.items()
        if DRIFT in arm
    ]
    head = ["| arm | effective sample share, last tenth of the steps | accuracy |", "|---|---|---|"]
    return [*head, *lines] if lines else []


def claim_paragraphs(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """One paragraph per claim, with what each task says of it."""
    said: dict[str, list[Mapping[str, Any]]] = {}
    for claim in claims:
        said.setdefault(claim["claim"], []).append(claim)
    lines = []
    for text, verdicts in said.items():
        lines += [f"**{text}** {' '.join(verdict_text(verdict) for verdict in verdicts)}", ""]
    return lines


def verdict_text(claim: Mapping[str, Any]) -> str:
    """What one task says of a claim, with the numbers behind it."""
    figures = claim["figures"]
    if not figures:
        return "Out of reach: no run here has such models."
    if figures["difference"] is None:
        return f"{figures['task']}: not measured (`{figures['contrast']}` on two seeds or more)."
    measure = figures["measure"].replace("_", " ")
    digits = 1 if figures["measure"] == "processor_seconds" else 3
    means = ", ".join(f"`{arm}` {value:.{digits}f}" for arm, value in figures["means"].items())
    difference = f"{figures['contrast'].replace(' - ', ' − ')} = {signed(figures['difference'], digits)}"
    seeds = f"{figures['seeds']} seeds"
    return f"{figures['task']}: {SIGNS[claim['verdict']]} ({measure}: {means}; {difference}; {seeds})."


def readme_line(evidence: Mapping[str, Any]) -> str:
    """What the README says of lightning against live: the paired differences, whatever they are."""
    parts = []
    for task, figures in evidence["tasks"].items():
        for name, kind in (("sampled", "one-sample estimator"), ("topk", "top-8")):
            if pair := figures["paired"].get(f"lightning_{name} - live_{name}"):
                parts.append(f"{task}, {kind}: {signed(pair['accuracy'], 3)} over {len(pair['seeds'])} seeds")
    said = "; ".join(parts) or "not measured"
    return (
        "Lightning − live in greedy accuracy at equal steps and estimator, paired by seed, with 95 % intervals: "
        f"{said}. Every claim about the method, with the negative results: [docs/evidence.md](docs/evidence.md)."
    )


def with_readme_line(readme: str, evidence: Mapping[str, Any]) -> str:
    """The README with its line between the marks `evidence`, which it must have."""
    assert README_LINE.search(readme), "the README has its marks"
    line = readme_line(evidence)
    return README_LINE.sub(lambda _: f"<!-- evidence -->\n{line}\n<!-- /evidence -->", readme)
