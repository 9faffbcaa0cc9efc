"""The figures of `docs/evidence.md` as SVG, drawn by matplotlib (extra `evidence`) from `docs/evidence.json` alone."""

from collections.abc import Mapping, Sequence
from io import StringIO
from statistics import mean
from typing import TYPE_CHECKING, Any

from opd_mcp.grading.paired import mean_over_seeds
from tools.evidence.arms import ARMS, DRIFT, SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLED = "lightning_sampled"
COST_LINES = ("lightning_topk", "trl_live", SAMPLED)
Arms = Mapping[str, Mapping[str, Any]]
ROUNDS = (("1", SAMPLED), ("2", "rounds_2"), ("4", "rounds_4"), ("every step (live)", "live_sampled"))
HORIZONS = (("10 %", "horizon_10"), ("30 %", "horizon_30"), ("growing", "horizon_growing"), ("100 %", SAMPLED))
COLOUR, OTHERS = "#3366cc", ("#3366cc", "#cc6633", "#339966")


def drawings(task: str, arms: Arms) -> dict[str, str]:
    """Each figure that a task's arms allow, as SVG by its name."""
    if not arms:
        return {}
    found = {"accuracy": accuracy_figure(task, arms), "cost": cost_figure(task, arms)}
    for name, title, points in (
        ("rounds", "rounds: rollouts drawn anew", ROUNDS),
        ("horizon", "the part of each response that is trained on", HORIZONS),
    ):
        known = [(label, arm) for label, arm in points if arm in arms]
        if len(known) > 1:
            found[name] = series_figure(f"{task}, {title}", known, arms)
    if len(drifted := {name: arm for name, arm in arms.items() if DRIFT in arm}) > 1:
        found["drift"] = drift_figure(task, drifted)
    return found


def accuracy_figure(task: str, arms: Arms) -> str:
    """A dot with its t-interval per arm."""
    figure, axes = _axes(height=0.9 + 0.26 * len(arms), title=f"{task}: greedy accuracy, 95 % t-interval over seeds")
    for place, arm in enumerate(reversed(arms.values())):
        _dot(axes, place, arm, across=True)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def cost_figure(task: str, arms: Arms) -> str:
    """Accuracy over processor seconds: one dot per arm, a line through the shares of its steps."""
    arms = {name: arm for name, arm in arms.items() if name in ARMS or name in SHARES}
    figure, axes = _axes(height=5.0, title=f"{task}: greedy accuracy over processor seconds, SFT and cache included")
    lines = {of: [name for name in (*SHARES, of) if SHARES.get(name, (name, 1))[0] == of] for of in COST_LINES}
    for colour, names in zip(OTHERS, lines.values(), strict=False):
        points = sorted((_spent(arms[name]), mean(arms[name]["accuracy"])) for name in names if name in arms)
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.5)
    for name, arm in arms.items():
        of = SHARES.get(name, (name, 1))[0]
        colour = OTHERS[list(lines).index(of)] if of in lines else "#888888"
        axes.plot(_spent(arm), mean(arm["accuracy"]), "o", color=colour, markersize=4)
        offset = {"xytext": (4, 3), "textcoords": "offset points"}
        axes.annotate(name, (_spent(arm), mean(arm["accuracy"])), fontsize=7, **offset)
    axes.set_xlabel("processor seconds, mean over seeds")
    axes.margins(x=0.15)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    return _svg(figure)


def series_figure(title: str, points: Sequence[tuple[str, str]], arms: Arms) -> str:
    """Accuracies with their intervals, in the order of one setting."""
    figure, axes = _axes(height=3.2, title=title)
    axes.plot(range(len(points)), [mean(arms[arm]["accuracy"]) for _, arm in points], color=COLOUR, alpha=0.5)
    for place, (_, arm) in enumerate(points):
        _dot(axes, place, arms[arm], across=False)
    axes.set_xticks(range(len(points)), [label for label, _ in points])
    axes.set_ylabel("greedy accuracy")
    axes.margins(x=0.1)
    axes.grid(axis="y", alpha=0.3)
    return _svg(figure)


def drift_figure(task: str, arms: Arms) -> str:
    """Accuracy over the effective sample share of the training's last tenth: one dot per seed, a colour per arm."""
    figure, axes = _axes(height=4.2, title=f"{task}: drift from the rollouts against quality, one dot per seed")
    for name, arm in arms.items():
        axes.plot(arm[DRIFT], arm["accuracy"], "o", markersize=4, label=name)
    axes.set_xlabel("effective sample share in the last tenth of the steps; 1: no drift")
    axes.set_ylabel("greedy accuracy")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    return _svg(figure)


def _axes(height: float, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    return figure, axes


def _dot(axes: "Axes", place: int, arm: Mapping[str, Any], *, across: bool) -> None:
    """The mean of an arm's accuracies with its interval, clipped to what an accuracy can be."""
    centre, estimate = mean(arm["accuracy"]), mean_over_seeds(arm["accuracy"])
    around = (max(estimate.low, 0.0), min(estimate.high, 1.0)) if estimate else (centre, centre)
    line, point = ((around, (place, place)), (centre, place))
    if not across:
        line, point = (line[1], line[0]), (place, centre)
    axes.plot(*line, color=COLOUR, linewidth=1.5)
    axes.plot(*point, "o", color=COLOUR, markersize=5)


def _spent(arm: Mapping[str, Any]) -> float:
    return mean(arm["processor_seconds"])


def _svg(figure: "Figure") -> str:
    """The drawing, the same for the same figures: no date, fixed ids, text as text."""
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())
