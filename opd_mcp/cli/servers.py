"""What runs until it is stopped: the MCP server, a teacher's server, the demo, the dashboard, and a run's worker."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opd_mcp.cli.shared import SERVERS, TEACHER_KEY, command, open_service, open_workspace, workspace_root

if TYPE_CHECKING:
    from opd_mcp.service import JobService


class Transport(StrEnum):
    """How a client reaches the server."""

    STDIO = "stdio"
    HTTP = "http"


class DemoTask(StrEnum):
    """The embedded tasks."""

    ARITHMETIC = "arithmetic"
    CHAIN_SUM = "chain_sum"


@command(rich_help_panel=SERVERS)
def serve(  # noqa: PLR0913  a command's options are its parameters
    allow_root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that clients may name paths below; repeatable.", exists=True, file_okay=False),
    ] = None,
    transport: Annotated[
        Transport, typer.Option(metavar="WAY", help="stdio for a client on this machine, or http.")
    ] = Transport.STDIO,
    host: Annotated[str, typer.Option(help="For http; one that others can reach needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For http.", min=1, max=65535)] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="For http: a file with the bearer token; or OPD_TOKEN; else the workspace's own.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="For http on this machine: let in all its users and programs, unasked."),
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="For http: a name the server is reached by; repeatable.")
    ] = None,
    allow_teacher_host: Annotated[
        list[str] | None,
        typer.Option(help="A host besides this machine that a teacher_url may name; repeatable."),
    ] = None,
    export_root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that models may be exported to; repeatable.", exists=True, file_okay=False),
    ] = None,
    export_hub: Annotated[
        list[str] | None,
        typer.Option(help="An owner on the Hub that models may be uploaded for (HF_TOKEN); repeatable."),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Offer no tool that starts, stops, deletes or exports.")
    ] = False,
    tools: Annotated[
        list[str] | None,
        typer.Option(help="Offer only these groups: plan, start, follow, artifacts, dashboard; comma or repeat."),
    ] = None,
    allow_delete: Annotated[bool, typer.Option(help="Offer delete_artifact and delete_run.")] = False,
    confirm_gpu_hours: Annotated[
        float, typer.Option(help="Ask before plans that take a device for longer.", min=0)
    ] = 8.0,
) -> None:
    """Serve the tools to an MCP client."""
    from opd_mcp.schemas.redaction import environment_secrets
    from opd_mcp.server.serve import ServerSettings, serve_http, serve_stdio
    from opd_mcp.server.tools.table import named_groups

    def opened() -> "JobService":
        return open_service(allow_root or [], export_root or [], allow_teacher_host or [], export_hub or [])

    def settings(token: str) -> ServerSettings:
        secrets = environment_secrets(os.environ | {"OPD_TOKEN": token})
        groups = named_groups(tools or [])
        return ServerSettings(confirm_gpu_hours, allow_delete, read_only, groups, secrets)

    if transport is Transport.STDIO:
        serve_stdio(opened, settings(os.environ.get("OPD_TOKEN", "")))
        return
    from opd_mcp.server.http_access import HttpAccess, announcement, known_token
    from opd_mcp.store.keys import session_mark

    workspace = open_workspace()
    token = None if no_token else known_token(workspace, token_file, os.environ.get("OPD_TOKEN"))
    access = HttpAccess(host, port, token, tuple(allowed_host or ()), session_mark(workspace)).checked()
    assert sys.__stderr__ is not None
    # Not by way of sys.stderr, which would leave the token out.
    print(announcement(access, on_terminal=sys.__stderr__.isatty()), file=sys.__stderr__, flush=True)
    serve_http(opened, settings(token() if token else ""), access)


@command(rich_help_panel=SERVERS)
def demo(
    seed: Annotated[int, typer.Option(help="Seed of every stage.", min=0)] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    task: Annotated[DemoTask, typer.Option(help="The embedded task.")] = DemoTask.ARITHMETIC,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: does it run here? Not: does it learn?")] = False,
) -> None:
    """Run the whole method on an embedded task through a real server, and print one table."""
    from opd_mcp.demo import QUICK, run_demo

    run_demo(seed, json_path, workspace_root(), task=task.value, overrides=QUICK if quick else None)


@command(rich_help_panel=SERVERS)
def dashboard(
    port: Annotated[int, typer.Option(metavar="PORT", help="Of this machine.", min=1, max=65535)] = 8000,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Show the live page of all runs, read-only, until Ctrl-C."""
    from opd_mcp.schemas.redaction import environment_secrets
    from opd_mcp.server.http_access import HttpAccess
    from opd_mcp.server.serve import ServerSettings, serve_http
    from opd_mcp.store.keys import session_mark, workspace_token

    workspace = open_workspace()
    token = workspace_token(workspace)
    access = HttpAccess("127.0.0.1", port, token, (), session_mark(workspace)).checked()
    address = f"http://127.0.0.1:{port}/dashboard?token={token()}"
    assert sys.__stdout__ is not None
    print(f"Dashboard: {address}\nCtrl-C ends it; runs go on.", file=sys.__stdout__, flush=True)
    if browser:
        import threading
        import webbrowser

        threading.Timer(1.0, webbrowser.open, [address]).start()
    secrets = environment_secrets(os.environ | {"OPD_TOKEN": token()})
    serve_http(open_service, ServerSettings(read_only=True, secrets=secrets), access)


@command("serve-teacher", rich_help_panel=SERVERS)
def serve_teacher(
    model: Annotated[Path, typer.Argument(help="A model's directory.", exists=True, file_okay=False)],
    host: Annotated[
        str, typer.Option(help="Another address than this machine's own needs OPD_TEACHER_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8001,
    threads: Annotated[int, typer.Option(help="CPU threads of the model.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered with 429.", min=1)] = 256,
    max_length: Annotated[int, typer.Option(help="Tokens of the longest sequence.", min=2)] = 32768,
) -> None:
    """Serve a model's log-probs: token ids in, log-probs and top-k out; the key is in OPD_TEACHER_KEY."""
    from opd_mcp.engine.scoring.server import RequestLimits, serve

    serve(model, host, port, os.environ.get(TEACHER_KEY), threads, RequestLimits(queue=queue, length=max_length))


@command(hidden=True)
def worker(  # noqa: PLR0913  a command's options are its parameters
    run_id: str,
    workspace: Annotated[Path | None, typer.Option()] = None,
    lock_fd: Annotated[int | None, typer.Option()] = None,
    lease_folder: Annotated[Path | None, typer.Option()] = None,
    cpu_slots: Annotated[int | None, typer.Option(min=1)] = None,
    ticket: Annotated[str | None, typer.Option()] = None,
    life: Annotated[int, typer.Option(min=0)] = 0,
    hosts: Annotated[str, typer.Option(help="of the job, with commas; this one first")] = "",
) -> None:
    """Do a queued run's work (started by the server; not for use by hand)."""
    from opd_mcp.devices.environment import hub_token
    from opd_mcp.devices.leases import LeaseFolder
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.schemas.redaction import RedactingStream, environment_secrets
    from opd_mcp.worker.main import WorkerSettings
    from opd_mcp.worker.main import main as work

    root, key, secrets = workspace or workspace_root(), os.environ.get(TEACHER_KEY), environment_secrets(os.environ)
    sys.stdout = RedactingStream(sys.stdout, secrets)
    defaults = JobSettings()
    leases = LeaseFolder(lease_folder or defaults.lease_folder, cpu_slots or defaults.cpu_slots)
    token = hub_token(os.environ)
    # A cluster gives its job some of a machine's GPUs.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if ticket else None
    settings = WorkerSettings(
        leases,
        key,
        secrets,
        hub_token=token,
        ticket=ticket,
        life=life,
        hosts=tuple(host for host in hosts.split(",") if host),
        visible_gpus=visible,
    )
    raise typer.Exit(work(root, run_id, lock_fd, settings))
