"""How training goes, in words: metrics, logs, and the dashboard for clients without pages."""

from opd_mcp.schemas.answers import DashboardFeed, LogPage, MetricSeries, MetricsReport
from opd_mcp.schemas.texts import shortened
from opd_mcp.server.render.runs import compact, judged_state, result_lines, verdict_lines

SHOWN_POINTS = 6
MAX_CHARACTERS = 6_000
SETTING_CHARACTERS = 200


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
        lines.append(f"{run.run_id}, {run.kind}, {judged_state(run.state, result)}, {run.models}")
        lines += [f"  {line}" for line in verdict_lines(result)]
        lines.append("  phases: " + ", ".join(f"{phase.name} {phase.state}" for phase in run.phases))
        if run.progress:
            lines.append(f"  {run.progress.done}/{run.progress.total} {run.progress.unit}")
        lines += [f"  {curve.key}: {curve.values[0]:.4g} → {curve.values[-1]:.4g}" for curve in run.curves]
        lines += [f"  ALERT {alert.code}: {alert.message}" for alert in run.alerts]
        lines += [f"  {line}" for line in result_lines({"scores": run.scores, "comparisons": run.comparisons})]
        lines += [f"  {run.error}"] if run.error else []
    return shortened("\n".join(lines), MAX_CHARACTERS, "ask for fewer runs")
