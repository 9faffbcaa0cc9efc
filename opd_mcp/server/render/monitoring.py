"""How training goes, in words: metrics, logs, and the dashboard for clients without pages."""

from collections import Counter
from collections.abc import Sequence

from opd_mcp.schemas.answers import ComparedArm, DashboardFeed, LogPage, MetricSeries, MetricsReport, RunComparison
from opd_mcp.schemas.next_action import CallText, NextAction
from opd_mcp.schemas.texts import shortened
from opd_mcp.server.render.runs import compact, judged_state, next_line, result_lines, verdict_lines

SHOWN_POINTS = 6
MAX_CHARACTERS = 6_000
SETTING_CHARACTERS = 200
CELL_CHARACTERS = 40


def metrics_text(report: MetricsReport) -> str:
    """The diagnosis and a line a metric; the points themselves are in the structured answer."""
    lines: list[str] = []
    for run in report.runs:
        lines += [f"{run.run_id}, {run.kind}, {run.state}: {run.diagnosis}", *map(series_line, run.series)]
    if report.differences:
        ids = " | ".join(run.run_id for run in report.runs)
        lines.append(f"settings that differ ({ids}):")
        lines += [
            f"  {name}: {' | '.join(compact(value, SETTING_CHARACTERS) for value in values)}"
            for name, values in report.differences.items()
        ]
    lines += [f"left out: {note}" for note in report.dropped]
    return shortened("\n".join(lines), MAX_CHARACTERS, "ask for fewer keys or runs")


def series_line(series: MetricSeries) -> str:
    """A metric in one line: where it began, a few values on the way, where it is."""
    stride = max(-(-len(series.values) // SHOWN_POINTS), 1)
    shown = [*series.values[:-1:stride], *series.values[-1:]]
    path = " → ".join(f"{value:.4g}" for value in shown)
    span = f"steps {series.steps[0]}–{series.steps[-1]}" if series.steps else "no steps"
    return f"  {series.key} ({span}{', ' + series.trend if series.trend else ''}): {path}"


def comparison_text(found: RunComparison, call_text: CallText = NextAction.call_text) -> str:
    """One table, a row per run, oldest first; then the paired differences, and how to read both."""
    figures = ("accuracy", "sampled_accuracy", "reverse_kl", "gain", "verdict", "seconds")
    shown = [name for name in figures if any(getattr(run, name) is not None for run in found.runs)]
    heads = ["run", *short_keys(found.settings), *shown, "state"]
    called = run_labels(found)
    rows = [
        [
            called[run.run_id],
            *(_setting(run.settings.get(name)) for name in found.settings),
            *(_figure(getattr(run, name)) for name in shown),
            run.not_measured or run.state,
        ]
        for run in found.runs
    ]
    lines = table_lines([heads, *rows])
    if found.best:
        name = called.get(found.best, found.best)
        lines.append(f"best: {name}" if name == found.best else f"best: {name} ({found.best})")
    for pair in found.paired:
        better, other = (called.get(run_id, run_id) for run_id in (pair.candidate, pair.baseline))
        difference = f"{_figure(pair.accuracy_difference)}, {pair.prompts} prompts"
        lines.append(f"accuracy of {better} minus {other}: {difference}")
    lines += arm_lines(found.arms)
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"{name}: {how}" for name, how in found.basis.items()]
    text = shortened("\n".join(lines), MAX_CHARACTERS, "compare fewer runs")
    return f"{text}\n{next_line(found.next_action, call_text)}"


def run_labels(found: RunComparison) -> dict[str, str]:
    """What each run is called in the table and below it: its name where no other run has it, else its id."""
    names = Counter(run.name for run in found.runs)
    return {run.run_id: run.name if run.name and names[run.name] == 1 else run.run_id for run in found.runs}


def short_keys(keys: Sequence[str]) -> list[str]:
    """Dotted keys by their last part, where that says which one is meant."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return [key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in keys]


def arm_lines(arms: list[ComparedArm]) -> list[str]:
    """A row per arm: quality, whole cost, and the asked arm minus it."""
    if not arms:
        return []
    heads = ["arm", "runs", "accuracy", "reverse_kl", "seconds", "asked − arm", "KL change"]
    rows = [
        [arm.arm, str(arm.runs), *map(_figure, (arm.accuracy, arm.reverse_kl, arm.seconds, arm.gain, arm.kl_change))]
        for arm in arms
    ]
    how = (
        "asked − arm: accuracy, paired by seed (by prompt where there is one seed); seconds: all stages to the student"
    )
    return ["", *table_lines([heads, *rows]), how]


def table_lines(rows: list[list[str]]) -> list[str]:
    """Rows of equal length as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _setting(value: object) -> str:
    return "–" if value is None else shortened(compact(value).strip('"').rpartition("/")[2], CELL_CHARACTERS)


def _figure(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def log_text(page: LogPage) -> str:
    """The lines, indented so that none is taken for one of ours, and how to see older ones."""
    lines = [f"  {line}" for line in page.lines] or ["no lines"]
    older = [f"older lines: cursor='{page.next_cursor}'"] if page.next_cursor else []
    return "\n".join([f"log of {page.run_id}:", *lines, *older])


def dashboard_text(feed: DashboardFeed) -> str:
    """The same in words: state, phases, last values, alerts, and the comparison."""
    lines = [f"{len(feed.runs)} of {len(feed.listed)} runs" if feed.listed else "no runs yet"]
    for run in feed.runs:
        result = {"verdict": run.verdict.to_dict()} if run.verdict else {}
        lines.append(f"{run.run_id}, {run.kind}, {judged_state(run.state, result)}, {run.name or run.models}")
        lines += [f"  {line}" for line in verdict_lines(result)]
        lines.append("  phases: " + ", ".join(f"{phase.name} {phase.state}" for phase in run.phases))
        if run.progress:
            lines.append(f"  {run.progress.done}/{run.progress.total} {run.progress.unit}")
        lines += [f"  {curve.key}: {curve.values[0]:.4g} → {curve.values[-1]:.4g}" for curve in run.curves]
        lines += [f"  ALERT {alert.code}: {alert.message}" for alert in run.alerts]
        lines += [f"  {line}" for line in result_lines({"scores": run.scores, "comparisons": run.comparisons})]
        lines += [f"  {run.error}"] if run.error else []
    return shortened("\n".join(lines), MAX_CHARACTERS, "ask for fewer runs")
