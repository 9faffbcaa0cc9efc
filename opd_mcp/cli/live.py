"""The live view of a run on a terminal: phases with log lines, time left, the curves as sparklines, alerts, scores."""

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from opd_mcp.cli.shared import terminal_width, wrapped

if TYPE_CHECKING:
    from opd_mcp.schemas.answers import DashboardRun
    from opd_mcp.schemas.runs import RunStatus
    from opd_mcp.service import JobService

BLOCKS = "▁▂▃▄▅▆▇█"
SIGNS = {"done": "✓", "running": "▶", "waiting": "·", "stopped": "✗"}
BAR_WIDTH = 30
SPARK_WIDTH = 30
KEY_WIDTH = 26
REDRAW_SECONDS = 1.0
LOG_LINES = 3
# what stands before a line's message: date, level INFO and the module's name; the time of day stays
BEFORE_MESSAGE = re.compile(r"^\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)[.\d]*Z (?:INFO )?(?:([A-Z]+) )?[\w.]+: ")


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The values as one line of blocks, each the mean of its stretch; empty without values."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [number * len(values) // count for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def bar(done: int, total: int, width: int = BAR_WIDTH) -> str:
    """Progress as a bar."""
    filled = min(width, round(width * done / total)) if total else 0
    return "█" * filled + "░" * (width - filled)


def view_lines(run: "DashboardRun", width: int, log: Sequence[str] = (), waits: str | None = None) -> list[str]:
    """The view of a run, the log's last lines under the phase that is running; no line is wider than the terminal.

    `waits` is what a queued run waits for.
    """
    from opd_mcp.schemas.texts import duration
    from opd_mcp.server.render.runs import result_lines

    lines = [f"{run.name or run.run_id}: {run.state}"]
    lines += [run.verdict.text()] if run.verdict else []
    lines.append(f"{run.run_id}  {run.models}")
    times = [f"elapsed {duration(run.elapsed_s)}"] if run.elapsed_s is not None else []
    times += [f"about {duration(run.eta_s)} left"] if run.eta_s is not None else []
    lines += [", ".join(times), ""] if times else [""]
    lines += [f"  {waits}", ""] if waits else []
    spent = {cost.stage: "reused" if cost.reused else duration(cost.seconds) for cost in run.costs}
    for phase in run.phases:
        lines.append(f"  {SIGNS.get(phase.state, '?')} {phase.name:<20} {spent.get(phase.name, '')}".rstrip())
        if phase.state == "running" and run.progress is not None:
            progress = run.progress
            lines.append(f"      {bar(progress.done, progress.total)} {progress.done}/{progress.total} {progress.unit}")
        elif phase.state == "running":
            first = phase is run.phases[0]
            lines.append("      the process starts and loads the models" if first else "      loads the models")
        if phase.state == "running":
            lines += [f"      {BEFORE_MESSAGE.sub(_time_and_level, line)}"[:width] for line in log]
    if run.curves:
        lines.append("")
    lines += [
        f"  {curve.key:<{KEY_WIDTH}} {sparkline(curve.values):<{SPARK_WIDTH}} {curve.values[-1]:.4g}"
        for curve in run.curves
        if curve.values
    ]
    lines += [f"  ! {alert.code}: {alert.message}" for alert in run.alerts]
    results = result_lines({"scores": run.scores, "comparisons": run.comparisons})
    lines += ["", *(f"  {line}" for line in results)] if results else []
    lines += ["", run.error] if run.error else []
    return [part for line in lines for part in (wrapped(line, width).splitlines() or [""])]


def waiting_text(status: "RunStatus", now: float) -> str | None:
    """What a run waits for that has not begun, and for how long; None for any other."""
    from opd_mcp.schemas.texts import duration
    from opd_mcp.store.run_view import seconds_of

    if status.state == "queued":
        since = duration(max(now - seconds_of(status.created_at), 0.0))
        return f"{status.waits_for or 'its process starts'}, for {since}"
    return "its process starts" if status.state == "running" and status.phase is None else None


def _time_and_level(found: re.Match[str]) -> str:
    return f"{found[1]} {found[2]} " if found[2] else f"{found[1]} "


def watch_run(service: "JobService", run_id: str, *, once: bool) -> None:
    """Draw the view in place until the run ends or the user presses Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from opd_mcp.schemas.requests import GetRunLogs
    from opd_mcp.schemas.runs import ACTIVE_STATES

    run_id = service.status(run_id).run_id

    def view() -> tuple[Text, bool]:
        status = service.status(run_id)  # attends to a run whose worker does not answer
        [run] = service.dashboard([run_id]).runs
        log, width = service.run_logs(GetRunLogs(run_id=run_id, tail=LOG_LINES)).escaped().lines, terminal_width()
        shown = run.escaped()
        text = Text("\n".join(view_lines(shown, width, log, waiting_text(status.escaped(), time.time()))))
        if shown.verdict and shown.verdict.is_bad:
            text.highlight_words([wrapped(shown.verdict.text(), width)], "red")
        return text, run.state in ACTIVE_STATES

    console = Console(highlight=False, soft_wrap=True)
    shown, active = view()
    if once:
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        try:
            while active:
                time.sleep(REDRAW_SECONDS)
                shown, active = view()
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            pass
