"""The command line: `opd-mcp serve | demo | status | logs | list | cancel | resume | audit | token | doctor …`.

The only place that reads the environment (`OPD_HOME`: the workspace, `OPD_TOKEN`: the HTTP token, `OPD_TEACHER_KEY`: a
teacher server's key). Every import beyond typer is inside the command that needs it, so that a server starts without
what only a worker uses, and the other way round.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

import typer

from opd_mcp import __version__

if TYPE_CHECKING:
    from opd_mcp.schemas.answers import GarbageReport
    from opd_mcp.schemas.base import Schema
    from opd_mcp.schemas.errors import OpdError
    from opd_mcp.service import JobService
    from opd_mcp.store.workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# the bearer token of a remote teacher, and of serve-teacher's own callers
TEACHER_KEY = "OPD_TEACHER_KEY"
Transport = Literal["stdio", "http"]
DemoTask = Literal["arithmetic", "chain_sum"]
ExportForm = Literal["input", "float32", "bfloat16", "adapter"]
Shown = TypeVar("Shown", bound="Schema")
AsJson = Annotated[bool, typer.Option("--json", help="Print the full record as JSON.")]


def print_version(asked: bool) -> None:
    """Print the version and end, where that was asked."""
    if asked:
        typer.echo(f"opd-mcp {__version__}")
        raise typer.Exit


@app.callback()
def common(version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True)] = False) -> None:
    """Distill a student with Lightning OPD, driven by an MCP client."""


@app.command()
def serve(  # noqa: PLR0913  a command's options are its parameters
    allow_root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that clients may name paths below; repeatable.", exists=True, file_okay=False),
    ] = None,
    transport: Annotated[Transport, typer.Option(help="stdio for a client on this machine.")] = "stdio",
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
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Offer no tool that starts, stops, deletes or exports.")
    ] = False,
    tools: Annotated[
        list[str] | None,
        typer.Option(help="Offer only these groups: plan, start, follow, artifacts, dashboard; comma or repeat."),
    ] = None,
    allow_delete: Annotated[bool, typer.Option(help="Offer delete_artifact.")] = False,
    confirm_gpu_hours: Annotated[
        float, typer.Option(help="Ask before plans that take a device for longer.", min=0)
    ] = 8.0,
) -> None:
    """Serve the tools to an MCP client."""
    from opd_mcp.schemas.redaction import environment_secrets
    from opd_mcp.server.serve import ServerSettings, serve_http, serve_stdio
    from opd_mcp.server.tools.table import named_groups

    def opened() -> "JobService":
        return open_service(allow_root or [], tuple(allow_teacher_host or ()), export_root or [])

    def settings(token: str) -> ServerSettings:
        secrets = environment_secrets(os.environ | {"OPD_TOKEN": token})
        groups = named_groups(tools or [])
        return ServerSettings(confirm_gpu_hours, allow_delete, read_only, groups, secrets)

    if transport == "stdio":
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


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of every stage.", min=0)] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    task: Annotated[DemoTask, typer.Option(help="The embedded task.")] = "arithmetic",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: does it run here? Not: does it learn?")] = False,
) -> None:
    """Run the whole method on an embedded task through a real server, and print one table."""
    from opd_mcp.demo import QUICK, run_demo

    run_demo(seed, json_path, workspace_root(), task=task, overrides=QUICK if quick else None)


@app.command()
def status(
    run_id: Annotated[str, typer.Argument(help="A run id, or latest.")] = "latest", as_json: AsJson = False
) -> None:
    """Show where a run stands."""
    from opd_mcp.server.render.runs import status_text
    from opd_mcp.server.tools.table import command_text

    found = open_service().status(run_id)
    show(found, as_json, lambda found: status_text(found, command_text))


@app.command()
def logs(
    run_id: Annotated[str, typer.Argument(help="A run id, or latest.")] = "latest",
    tail: Annotated[int, typer.Option(help="Lines to show.", min=1, max=200)] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the last lines of a run's log."""
    from opd_mcp.schemas.requests import GetRunLogs

    found = open_service().run_logs(GetRunLogs(run_id=run_id, tail=tail))
    show(found, as_json, lambda found: "\n".join(found.lines))


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(help="Runs to show.", min=1, max=100)] = 20, as_json: AsJson = False
) -> None:
    """List runs, newest first."""
    from opd_mcp.server.render.runs import list_text

    found = open_service().list_runs(limit=limit)
    show(found, as_json, list_text)


@app.command()
def cancel(run_id: Annotated[str, typer.Argument(help="A run id, or latest.")], as_json: AsJson = False) -> None:
    """Ask an active run to stop."""
    from opd_mcp.server.render.runs import cancel_text
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    found = audited(service, "cancel_run", {"run_id": run_id}, lambda: service.cancel(run_id))
    show(found, as_json, lambda found: cancel_text(found, command_text))


@app.command()
def resume(run_id: Annotated[str, typer.Argument(help="A run id, or latest.")], as_json: AsJson = False) -> None:
    """Resume a failed, cancelled or lost run from its last checkpoint."""
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    found = audited(service, "resume_run", {"run_id": run_id}, lambda: service.resume(run_id))
    show(found, as_json, lambda found: snapshot_text(found, command_text))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run id, an artifact id, a Hub id or a directory.")],
    destination: Annotated[Path, typer.Argument(help="A new directory.")],
    form: Annotated[ExportForm, typer.Option("--format", help="Dtype of the weights, or the adapter.")] = "input",
    as_json: AsJson = False,
) -> None:
    """Write a model with its tokenizer and model card to a new directory, in the background."""
    from opd_mcp.schemas.requests import ExportStudent
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    source, target = Path(model), destination.absolute()
    reference = str(source.resolve()) if source.is_dir() else model
    service = open_service([source] if source.is_dir() else [], export_roots=[target.parent])
    request = ExportStudent(model=reference, destination=str(target), format=form)
    found = audited(service, "export_student", request.to_dict(), lambda: service.export_student(request))
    show(found, as_json, lambda found: snapshot_text(found, command_text))


@app.command()
def doctor(
    repair: Annotated[bool, typer.Option(help="Rebuild the index from the run directories.")] = False,
) -> None:
    """Check the set-up and say how to fix what is wrong."""
    from opd_mcp.maintenance.doctor import checks
    from opd_mcp.schemas.next_action import advice_text
    from opd_mcp.schemas.texts import escaped
    from opd_mcp.server.tools.table import command_text

    service = open_service()
    if repair:
        for problem in service.store.rebuild():
            typer.echo(error_line(problem), err=True)
    found = list(checks(service))
    for check in found:
        typer.echo(f"{'ok ' if check.well else 'BAD'} {check.name}: {escaped(check.found)}")
        if not check.well:
            typer.echo(f"    fix: {escaped(advice_text(check.fix, check.call, command_text))}")
    raise typer.Exit(int(not all(check.well for check in found)))


@app.command()
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


@app.command()
def audit(
    limit: Annotated[int, typer.Option(help="Calls to show, the last ones.", min=1)] = 50, as_json: AsJson = False
) -> None:
    """Show the calls that started, stopped, resumed, deleted or exported something, and who made them."""
    from opd_mcp.server.audit import AuditLog, audit_text

    show(AuditLog(open_workspace()).page(limit), as_json, audit_text)


@app.command()
def token(
    new: Annotated[bool, typer.Option("--new", help="Make a new one; the old one is refused at once.")] = False,
    sign_out: Annotated[
        bool, typer.Option("--sign-out", help="Print nothing, and end the sessions of all dashboards.")
    ] = False,
) -> None:
    """Print the bearer token of this workspace's HTTP servers."""
    from opd_mcp.store.keys import end_sessions, replace_token, workspace_token

    workspace = open_workspace()
    if sign_out:
        end_sessions(workspace)
    if new:
        replace_token(workspace)
    if not sign_out:
        typer.echo(workspace_token(workspace)())


CacheArgument = Annotated[str, typer.Argument(help="A cache id, a run id, or a teacher cache's directory.")]
cache_app = typer.Typer(no_args_is_help=True, help="Look at, prove, convert and merge teacher caches.")
app.add_typer(cache_app, name="cache")


@cache_app.command("inspect")
def cache_inspect(cache: CacheArgument, as_json: AsJson = False) -> None:
    """Show the manifest, the statistics and two decoded rows."""
    from opd_mcp.server.render.caches import inspection_text
    from opd_mcp.views.cache import inspect_cache

    found = inspect_cache(cache_directory(cache))
    show(found, as_json, inspection_text)


@cache_app.command("verify")
def cache_verify(
    cache: CacheArgument,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The teacher's directory, to score a sample again.", exists=True, file_okay=False),
    ] = None,
    teacher_url: Annotated[
        str | None, typer.Option(help="Or the server that scores for it; its key is in OPD_TEACHER_KEY.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Rows to score again.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts and values, and score a sample again; exit status 1 when something is wrong."""
    from opd_mcp.engine.cache.verify import verified

    directory, rescore = cache_directory(cache), None
    if teacher is not None:
        from opd_mcp.engine.scoring.local import rescorer

        rescore = rescorer(teacher)
    elif teacher_url is not None:
        from opd_mcp.engine.scoring.remote import remote_rescorer
        from opd_mcp.identity.lineage import read_manifest
        from opd_mcp.schemas.identity import RemoteTeacher

        expected = read_manifest(directory).teacher
        served = RemoteTeacher(name=expected.name, url=teacher_url)
        rescore = remote_rescorer(served, directory / "tokenizer", os.environ.get(TEACHER_KEY), expected)
    found = verified(directory, rescore, sample=sample)
    show(found, as_json, lambda found: found.text())
    raise typer.Exit(bool(found.problems))


@cache_app.command("convert")
def cache_convert(
    source: Annotated[Path, typer.Argument(help="The paper authors' Parquet file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(help="A new directory.")],
    student: Annotated[
        Path, typer.Option(help="The SFT student, whose tokenizer holds.", exists=True, file_okay=False)
    ],
    teacher_name: Annotated[str, typer.Option(help="The teacher's name; asserted, since the file does not say.")],
    as_json: AsJson = False,
) -> None:
    """Make a teacher cache of the paper authors' Parquet, and name what it lacks."""
    from opd_mcp.engine.cache.convert import converted
    from opd_mcp.server.render.caches import manifest_lines

    found = converted(source, output, student=student, teacher_name=teacher_name)
    show(found, as_json, lambda found: "\n".join(manifest_lines(found)))


@cache_app.command("merge")
def cache_merge(
    output: Annotated[Path, typer.Argument(help="A new directory.")],
    caches: Annotated[list[str], typer.Argument(help="Two or more caches of one teacher and one student.")],
    as_json: AsJson = False,
) -> None:
    """Put caches of the same teacher and student together."""
    from opd_mcp.engine.cache.merge import merged

    directories = [cache_directory(cache) for cache in caches]
    manifest = merged(output, directories)
    if workspace_root().is_dir():
        artifacts = open_service().store.artifacts
        if all(map(artifacts.made_here, directories)):  # else its lineage proves no more than theirs
            artifacts.key.key.sign(output)
    show(manifest, as_json, lambda manifest: f"{manifest.rows} rows, {manifest.tokens} tokens: {output}")


@app.command("serve-teacher")
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


@app.command(hidden=True)
def worker(
    run_id: str,
    workspace: Annotated[Path | None, typer.Option()] = None,
    lock_fd: Annotated[int | None, typer.Option()] = None,
    lease_folder: Annotated[Path | None, typer.Option()] = None,
    cpu_slots: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Do a queued run's work (started by the server; not for use by hand)."""
    from opd_mcp.devices.leases import LeaseFolder
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.schemas.redaction import RedactingStream, environment_secrets
    from opd_mcp.worker.main import WorkerSettings
    from opd_mcp.worker.main import main as work

    root, key, secrets = workspace or workspace_root(), os.environ.get(TEACHER_KEY), environment_secrets(os.environ)
    sys.stdout = RedactingStream(sys.stdout, secrets)
    defaults = JobSettings()
    leases = LeaseFolder(lease_folder or defaults.lease_folder, cpu_slots or defaults.cpu_slots)
    raise typer.Exit(work(root, run_id, lock_fd, WorkerSettings(leases, key, secrets)))


def show(found: Shown, as_json: bool, text: Callable[[Shown], str]) -> None:
    """Print a record as JSON, or as its text; what a value holds neither breaks a line nor reaches the terminal."""
    from opd_mcp.schemas.texts import LINE_BREAK

    typer.echo(found.escaped(keep=LINE_BREAK).to_json() if as_json else text(found.escaped()))


def audited(service: "JobService", command: str, arguments: Mapping[str, object], call: Callable[[], Shown]) -> Shown:
    """The call's answer, with its lines in the audit log."""
    from opd_mcp.server.audit import COMMAND_LINE, AuditLog

    return AuditLog(service.workspace).recorded(COMMAND_LINE, command, arguments, call)


def open_workspace() -> "Workspace":
    """The workspace, made at its first use."""
    from opd_mcp.store.workspace import Workspace

    return Workspace(workspace_root())


def workspace_root() -> Path:
    """The workspace that `OPD_HOME` names, or the user's default one."""
    from opd_mcp.store.workspace import default_workspace_root

    home = os.environ.get("OPD_HOME")
    return Path(home).expanduser().absolute() if home else default_workspace_root()


def cache_directory(reference: str) -> Path:
    """Where the teacher cache is that a directory, a cache id or a run id means; raises UnknownIdError."""
    path = Path(reference)
    return path if path.is_dir() else open_service().cache_directory(reference)


def open_service(
    allow_roots: Sequence[Path] = (), teacher_hosts: tuple[str, ...] = (), export_roots: Sequence[Path] = ()
) -> "JobService":
    """The service over the workspace; it may read what is below it, the examples and the given folders."""
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.service import JobService
    from opd_mcp.store.roots import AllowedRoots

    return JobService(
        open_workspace(),
        AllowedRoots(allow_roots),
        JobSettings(teacher_hosts=teacher_hosts, export_roots=tuple(export_roots)),
    )


def main() -> None:
    """The console script: an expected failure is one line on stderr and exit status 1.

    Whatever is written is for its owner alone, and holds no secret of the environment.
    """
    from opd_mcp.schemas.errors import OpdError
    from opd_mcp.schemas.redaction import RedactingStream, environment_secrets

    os.umask(0o077)
    sys.stderr = RedactingStream(sys.stderr, environment_secrets(os.environ))
    try:
        app()
    except OpdError as error:
        fail(error)
    except OSError as error:
        from opd_mcp.store.files import expected_failure, workspace_failure

        if expected := expected_failure(error) or workspace_failure(error, workspace_root()):
            fail(expected)
        raise


def error_line(error: "OpdError") -> str:
    """An expected failure in one line, with commands for its calls."""
    from opd_mcp.schemas.texts import escaped
    from opd_mcp.server.tools.table import command_text

    return escaped(error.text(command_text))


def fail(error: "OpdError") -> NoReturn:
    """Print an expected failure on stderr, with commands for its calls, and end with exit status 1."""
    typer.echo(error_line(error), err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
