"""`docs/evidence.md` and its figures, written from `docs/evidence.json` alone."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from opd_mcp.grading.paired import mean_over_seeds

WIDTH, ROW, LEFT, RIGHT, TOP = 720, 24, 170, 30, 40
SIGNS = {"reproduced": "reproduced", "refuted": "**refuted**", "out of reach": "out of reach"}
HEAD = """# Evidence

Made by one command, which goes on where it stopped:

    python tools/evidence/measure.py --work DIR

Greedy accuracy on `eval.jsonl`, reverse KL to the teacher in nats per token on fresh samples, and processor seconds of
the workers, all stages up to the student, SFT included. Every arm of a task takes the same steps with the same batch
and seeds. Differences are paired by seed, with 95 % t-intervals. A claim is *reproduced* where its interval says so,
*refuted* where it says the opposite, and *out of reach* where these runs cannot decide it. Two arms count as alike
where the interval lies above −0.05 in accuracy; that margin was fixed before anything was measured. The figures are in
[evidence.json](evidence.json).
"""


def document(evidence: Mapping[str, Any], command_line: str) -> str:
    """The page, with a table, two figures and the shared costs of each task, then a paragraph for every claim."""
    lines = [HEAD]
    if evidence.get("quick"):
        lines.append("**Figures of the quick part: they show that the command works, and nothing else.**\n")
    for task, figures in evidence["tasks"].items():
        lines += [f"## {task}", "", f"![accuracy by arm](evidence-{task}-accuracy.svg)", ""]
        lines += [f"![accuracy over processor seconds](evidence-{task}-cost.svg)", "", *arm_table(figures["arms"])]
        lines += ["", *pair_table(figures["paired"]), "", *shared_table(figures["students_per_cache"]), ""]
    lines += ["## Claims", ""]
    for claim in evidence["claims"]:
        lines += [claim_text(claim), ""]
    return "\n".join([*lines, f"Made by `{command_line}`.", ""])


def arm_table(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per arm: means with their t-intervals over seeds."""
    lines = ["| arm | seeds | accuracy | reverse KL | processor seconds |", "|---|---|---|---|---|"]
    for name, arm in arms.items():
        cells = [with_interval(arm[measure], digits) for measure, digits in (("accuracy", 3), ("reverse_kl", 3))]
        lines.append(f"| `{name}` | {len(arm['seeds'])} | {' | '.join(cells)} | {mean(arm['processor_seconds']):.1f} |")
    return lines


def with_interval(values: Sequence[float], digits: int) -> str:
    """The mean, with its t-interval where there are two values or more."""
    estimate = mean_over_seeds(values)
    if estimate is None:
        return f"{mean(values):.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def pair_table(paired: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row per pair of arms: differences with their intervals."""
    lines = ["| difference | seeds | accuracy | reverse KL | processor seconds |", "|---|---|---|---|---|"]
    for name, pair in paired.items():
        cells = [
            f"{pair[measure][0]:+.{digits}f} [{pair[measure][1]:+.{digits}f}, {pair[measure][2]:+.{digits}f}]"
            for measure, digits in (("accuracy", 3), ("reverse_kl", 3), ("processor_seconds", 1))
        ]
        lines.append(f"| {name.replace(' - ', ' − ')} | {len(pair['seeds'])} | {' | '.join(cells)} |")
    return lines


def shared_table(shared: Mapping[str, Sequence[float]]) -> list[str]:
    """Processor seconds per student beyond the SFT, by the number of students that share a cache."""
    lines = ["| processor seconds per student, without the SFT | 1 student | 2 | 5 |", "|---|---|---|---|"]
    return lines + [f"| `{arm}` | {' | '.join(f'{value:.1f}' for value in values)} |" for arm, values in shared.items()]


def claim_text(claim: Mapping[str, Any]) -> str:
    """One paragraph: the claim, its verdict, and the numbers behind it."""
    figures = claim["figures"]
    text = f"{SIGNS[claim['verdict']]}: {claim['claim']}"
    if not figures:
        return f"{text} No run here has such models."
    pair = " − ".join(f"`{name}`" for name in figures["pair"])
    if figures["difference"] is None:
        return f"{text} ({figures['task']}: {pair} was not measured on two seeds.)"
    value, low, high = figures["difference"]
    measure = figures["measure"].replace("_", " ")
    difference = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{text} ({figures['task']}: {pair} in {measure} {difference}, {figures['seeds']} seeds.)"


def accuracy_figure(task: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG: a dot with its t-interval per arm."""
    height = TOP + ROW * len(arms) + 30
    parts = [_text(LEFT, 20, f"{task}: greedy accuracy, mean over seeds and 95 % t-interval", "start")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _across(tick)
        parts += [_line(x, TOP - 10, x, height - 24, "#ddd"), _text(x, height - 8, f"{tick:g}", "middle")]
    for number, (name, arm) in enumerate(arms.items()):
        y = TOP + ROW * number + ROW // 2
        estimate = mean_over_seeds(arm["accuracy"])
        parts.append(_text(LEFT - 10, y + 4, name, "end"))
        if estimate is not None:
            parts.append(_line(_across(max(estimate.low, 0.0)), y, _across(min(estimate.high, 1.0)), y, "#36c"))
        parts.append(f'<circle cx="{_across(mean(arm["accuracy"])):.1f}" cy="{y}" r="4" fill="#36c"/>')
    return _svg(height, parts)


def cost_figure(task: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG: accuracy over processor seconds, a dot per arm."""
    height, bottom = 360, 320
    most = max([mean(arm["processor_seconds"]) for arm in arms.values()], default=1.0) or 1.0
    parts = [_text(LEFT, 20, f"{task}: greedy accuracy over processor seconds, SFT included", "start")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - tick * (bottom - TOP)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"), _text(LEFT - 10, y + 4, f"{tick:g}", "end")]
        parts.append(_text(_across(tick), bottom + 20, f"{tick * most:.3g} s", "middle"))
    for name, arm in arms.items():
        x, y = _across(mean(arm["processor_seconds"]) / most), bottom - mean(arm["accuracy"]) * (bottom - TOP)
        anchor = "end" if x > WIDTH - 150 else "start"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#36c"/>')
        parts.append(_text(x + (-8 if anchor == "end" else 8), y - 4, name, anchor))
    return _svg(height, parts)


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _line(x: float, y: float, end_x: float, end_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}" stroke="{colour}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    style = 'font-family="sans-serif" font-size="12"'
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    paper = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{paper}\n{body}\n</svg>\n'
