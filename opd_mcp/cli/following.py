"""What follows runs: status, watch, metrics, logs, list, compare, report, cancel, resume."""

import sys
import time
from typing import Annotated

import typer

from opd_mcp.cli.shared import (
    RUNS,
    AsJson,
    RunArgument,
    audited,
    command,
    completed_run,
    open_service,
    say,
    show,
    terminal_width,
)

POLL_SECONDS = 0.5


@command(rich_help_panel=RUNS)
def status(run_id: RunArgument = "latest", as_json: AsJson = False) -> None:
    """Show where a run stands."""
    from opd_mcp.server.render.runs import status_text
    from opd_mcp.server.tools.table import command_text

    found = open_service().status(run_id)
    show(found, as_json, lambda found: status_text(found, command_text))


@command(rich_help_panel=RUNS)
def watch(
    run_id: RunArgument = "latest",
    once: Annotated[bool, typer.Option("--once", help="Print the view once.")] = False,
) -> None:
    """Follow a run live: phases, progress, time left, curves; Ctrl-C ends the view, not the run."""
    from opd_mcp.cli.live import watch_run

    watch_run(open_service(), run_id, once=once or not sys.stdout.isatty())


@command(rich_help_panel=RUNS)
def metrics(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Up to 4 runs; the newest without.", autocompletion=completed_run, show_default=False
        ),
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", "-k", metavar="KEY", help="E.g. distill.loss; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the training curves of runs with their trend, and what differs between the runs."""
    from opd_mcp.schemas.requests import GetRunMetrics
    from opd_mcp.server.protocol.arguments import request_from_arguments
    from opd_mcp.server.render.monitoring import metrics_text

    given = {"run_ids": runs or ["latest"], "keys": keys or []}
    show(
        open_service().run_metrics(request_from_arguments("opd-mcp metrics", GetRunMetrics, given)),
        as_json,
        metrics_text,
    )


@command(rich_help_panel=RUNS)
def logs(
    run_id: RunArgument = "latest",
    tail: Annotated[int, typer.Option("--tail", "-n", metavar="N", help="Lines to show.", min=1, max=200)] = 50,
    contains: Annotated[str | None, typer.Option(metavar="WORDS", help="Only lines with this.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the last lines of a run's log, or follow it."""
    from opd_mcp.schemas.requests import GetRunLogs
    from opd_mcp.schemas.runs import ACTIVE_STATES
    from opd_mcp.schemas.texts import escaped
    from opd_mcp.store.logs import LogFollower
    from opd_mcp.store.runs import LOG_FILE

    service = open_service()
    run_id = service.status(run_id).run_id
    follower = LogFollower(service.workspace.run(run_id) / LOG_FILE)
    # The page ends where the follower begins, so that no line is missing and none is shown twice.
    found = service.run_logs(GetRunLogs(run_id=run_id, tail=tail, contains=contains, cursor=str(follower.offset)))
    show(found, as_json, lambda found: "\n".join(found.lines))
    while follow and not as_json:
        active = service.status(run_id).state in ACTIVE_STATES  # before the last look
        for line in follower.lines():
            if contains is None or contains in line:
                typer.echo(escaped(line))
        if not active:
            break
        time.sleep(POLL_SECONDS)


@command("list", rich_help_panel=RUNS)
def list_runs(  # noqa: PLR0913  a command's options are its parameters
    state: Annotated[
        str | None,
        typer.Option(metavar="STATE", help="queued, running, succeeded, failed, cancelled or lost."),
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="E.g. distill, sft, cache or benchmark.")] = None,
    name: Annotated[str | None, typer.Option(metavar="PART", help="A part of the name.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", "-t", metavar="TAG", help="One of its tags.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Runs to show.", min=1, max=100)] = 20,
    cursor: Annotated[str | None, typer.Option(metavar="CURSOR", help="next_cursor of the page before.")] = None,
    as_json: AsJson = False,
) -> None:
    """List runs as a table, newest first."""
    from opd_mcp.schemas.requests import ListRuns
    from opd_mcp.server.protocol.arguments import request_from_arguments
    from opd_mcp.server.render.runs import runs_table

    given = {"state": state, "kind": kind, "name": name, "tag": tag, "limit": limit, "cursor": cursor}
    request = request_from_arguments("opd-mcp list", ListRuns, given)
    found = open_service().list_runs(**dict(request))
    width = terminal_width() if sys.stdout.isatty() else None
    show(found, as_json, lambda found: runs_table(found, width))


@command(rich_help_panel=RUNS)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run ids or names, or one tag or sweep id.", autocompletion=completed_run),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare runs in one table: settings that differ, figures of their reports, paired differences."""
    from opd_mcp.schemas.requests import CompareRuns
    from opd_mcp.server.render.monitoring import comparison_text
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    tag = runs[0] if len(runs) == 1 and service.store.index.runs(tag=runs[0]) else None
    found = service.compare_runs(CompareRuns(tag=tag) if tag else CompareRuns(run_ids=runs))
    show(found, as_json, lambda found: comparison_text(found, command_text))


@command(rich_help_panel=RUNS)
def report(run_id: RunArgument = "latest", as_json: AsJson = False) -> None:
    """Print the report that a run ended with; without a run, of the newest that has one."""
    from opd_mcp.schemas.texts import LINE_BREAK, escaped
    from opd_mcp.views.resources import REPORT_JSON, latest_with_report, report_file

    service = open_service()
    newest = latest_with_report(service.store) if run_id == "latest" else None
    file = report_file(service.store, newest or service.status(run_id).run_id)
    if as_json:
        typer.echo(escaped((file.parent / REPORT_JSON).read_text(encoding="utf-8"), keep=LINE_BREAK))
    else:
        say(escaped(file.read_text(encoding="utf-8"), keep=LINE_BREAK))


@command(rich_help_panel=RUNS)
def cancel(
    run_id: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, latest, or a tag: all its runs.", autocompletion=completed_run),
    ],
    as_json: AsJson = False,
) -> None:
    """Ask an active run, or all with a tag, to stop."""
    from opd_mcp.server.render.runs import cancel_text
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    found = audited(service, "cancel_run", {"run_id": run_id}, lambda: service.cancel(run_id))
    show(found, as_json, lambda found: cancel_text(found, command_text))


@command(rich_help_panel=RUNS)
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run, or latest.", autocompletion=completed_run)],
    as_json: AsJson = False,
) -> None:
    """Resume a failed, cancelled or lost run from its last checkpoint."""
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    found = audited(service, "resume_run", {"run_id": run_id}, lambda: service.resume(run_id))
    show(found, as_json, lambda found: snapshot_text(found, command_text))
