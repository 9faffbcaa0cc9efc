"""What looks after a workspace: doctor, gc, artifacts, deletion, trackers, engines, the audit log and the token."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opd_mcp.cli.shared import (
    UPKEEP,
    AsJson,
    Command,
    Group,
    RunArgument,
    Yes,
    agree,
    app,
    audited,
    command,
    completed_run,
    error_line,
    open_service,
    open_workspace,
    say,
    show,
)

if TYPE_CHECKING:
    from opd_mcp.schemas.answers import GarbageReport


@command(rich_help_panel=UPKEEP)
def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild the index from the run directories.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the set-up and say how to fix what is wrong."""
    from opd_mcp.maintenance.doctor import CheckReport, checks
    from opd_mcp.schemas.next_action import advice_text
    from opd_mcp.schemas.texts import escaped
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    if repair:
        for problem in service.store.rebuild():
            typer.echo(error_line(problem), err=True)
    found = list(checks(service))
    if as_json:
        show(CheckReport.of(found), True, str)
    for check in () if as_json else found:
        say(f"{'ok ' if check.well else 'BAD'} {check.name}: {escaped(check.found)}")
        if not check.well:
            say(f"    fix: {escaped(advice_text(check.fix, check.call, command_text))}")
    raise typer.Exit(int(not all(check.well for check in found)))


@command(rich_help_panel=UPKEEP)
def artifacts(
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Only prompts, responses, model, cache or report.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Artifacts to show.", min=1, max=100)] = 20,
    cursor: Annotated[str | None, typer.Option(metavar="CURSOR", help="next_cursor of the page before.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what runs have made, newest first."""
    from opd_mcp.schemas.requests import ListArtifacts
    from opd_mcp.server.protocol.arguments import request_from_arguments
    from opd_mcp.server.render.workspace import artifacts_text

    given = {"kind": kind, "limit": limit, "cursor": cursor}
    request = request_from_arguments("opd-mcp artifacts", ListArtifacts, given)
    show(open_service().list_artifacts(request), as_json, artifacts_text)


@command(rich_help_panel=UPKEEP)
def rm(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Runs, sweeps or artifacts.", autocompletion=completed_run)
    ],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete runs with what nothing else needs, all of a sweep by its id, or artifacts, after one question each."""
    from opd_mcp.server.render.workspace import deleted_run_text, deleted_text
    from opd_mcp.service import LATEST

    service = open_service()
    for name in ids:
        if service.store.artifacts.find(name) is not None:
            agree(service.deletion_question(name), yes)
            gone = audited(service, "delete_artifact", {"artifact_id": name}, partial(service.delete_artifact, name))
            show(gone, as_json, deleted_text)
            continue
        for run_id in [name] if name == LATEST else service.runs_of(name):
            agree(service.run_deletion_question(run_id), yes)
            deleted = audited(service, "delete_run", {"run_id": run_id}, partial(service.delete_run, run_id))
            show(deleted, as_json, deleted_run_text)


@command(rich_help_panel=UPKEEP)
def track(run_id: RunArgument = "latest", as_json: AsJson = False) -> None:
    """Send a run to the trackers of settings.toml, where they do not have all of it (docs/tracking.md)."""
    from opd_mcp.tracking.processes import caught_up, report_text

    service = open_service()
    found = caught_up(service.workspace, service.status(run_id).run_id)
    show(found, as_json, report_text)
    raise typer.Exit(int(not all(row.complete for row in found.trackers)))


@command(rich_help_panel=UPKEEP)
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List only.")] = False,
    older_than: Annotated[
        float, typer.Option(help="Days since an unfinished build or an old index was last written to.", min=0)
    ] = 14.0,
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Also artifacts that no run, lineage or result needs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is unused: abandoned builds, checkpoints of succeeded runs, temporary files."""
    from opd_mcp.maintenance.gc import collected
    from opd_mcp.server.render.workspace import garbage_text

    service = open_service()

    def collect() -> "GarbageReport":
        return collected(service.store, remove=not dry_run, older_than_days=older_than, artifacts=artifacts)

    options = {"older_than": older_than, "artifacts": artifacts}
    show(collect() if dry_run else audited(service, "gc", options, collect), as_json, garbage_text)


engines_app = typer.Typer(cls=Group, invoke_without_command=True)
app.add_typer(engines_app, name="engines", rich_help_panel=UPKEEP)


@engines_app.callback()
def engines(context: typer.Context, as_json: AsJson = False) -> None:
    """List the engines that settings.toml names, and whether they start (docs/engines.md)."""
    if context.invoked_subcommand is not None:
        return
    from opd_mcp.maintenance.engines import configured, engines_text

    show(configured(open_workspace(), os.environ), as_json, engines_text)


@engines_app.command("install", cls=Command)
def engines_install(
    name: Annotated[str, typer.Argument(metavar="NAME", help="vllm.")],
    python: Annotated[
        Path | None,
        typer.Option(help="The Python of its environment; vLLM's CPU build needs 3.11.", exists=True, dir_okay=False),
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="Another package or version than the measured one, as pip takes it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Install an engine into an environment of its own below the workspace, and name it in settings.toml."""
    import sys

    from opd_mcp.maintenance.engines import InstallWish, installation_text, installed, planned

    workspace, wish = open_workspace(), InstallWish(name, str(python or sys.executable), package)
    show(planned(workspace, wish) if dry_run else installed(workspace, wish, os.environ), as_json, installation_text)


@command(rich_help_panel=UPKEEP)
def audit(
    limit: Annotated[int, typer.Option(help="Calls to show, the last ones.", min=1)] = 50, as_json: AsJson = False
) -> None:
    """Show the calls that started, stopped, resumed, deleted or exported something, and who made them."""
    from opd_mcp.server.audit import AuditLog, audit_text

    show(AuditLog(open_workspace()).page(limit), as_json, audit_text)


@command(rich_help_panel=UPKEEP)
def token(
    new: Annotated[bool, typer.Option("--new", help="Make a new one; the old one is refused at once.")] = False,
    sign_out: Annotated[
        bool, typer.Option("--sign-out", help="Print nothing, and end the sessions of all dashboards.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the bearer token of this workspace's HTTP servers."""
    from opd_mcp.store.keys import end_sessions, replace_token, workspace_token

    workspace = open_workspace()
    if sign_out:
        end_sessions(workspace)
    if new:
        replace_token(workspace)
    if as_json:
        import json

        typer.echo(json.dumps({"signed_out": True} if sign_out else {"token": workspace_token(workspace)()}))
    elif not sign_out:
        typer.echo(workspace_token(workspace)())
