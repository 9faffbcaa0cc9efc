"""What all commands share: the application, its workspace and service, and how answers and failures are printed."""

import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from opd_mcp.planning.confirmation import Question
    from opd_mcp.schemas.base import Schema
    from opd_mcp.schemas.errors import OpdError
    from opd_mcp.service import JobService
    from opd_mcp.store.workspace import Workspace

NUMBERS = {int: "N", float: "N"}


def described(params: list[Any]) -> list[Any]:
    """The parameters with a word for people in place of a type, where they have none: nothing for a switch."""
    for param in params:
        param._get_number_range_help_str = lambda: None  # a wrong number is told with its range
        if param.type_descriptor.is_choice:
            continue
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: None
        elif param.metavar is None:
            param.metavar = NUMBERS.get(param.type_descriptor.annotation, "")
    return params


class Command(TyperCommand):
    """A command whose help names no types of Python."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as the help shows them."""
        return described(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands whose help names no types of Python."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as the help shows them."""
        return described(super().get_params(ctx))


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distill a student with Lightning OPD: from an MCP client, or with these commands.",
)
command = partial(app.command, cls=Command)
RUNS, STARTS, UPKEEP, SERVERS = "Runs", "Start", "Workspace", "Servers"
"""The panels of the help."""
# the bearer token of a remote teacher, and of serve-teacher's own callers
TEACHER_KEY = "OPD_TEACHER_KEY"
Shown = TypeVar("Shown", bound="Schema")
AsJson = Annotated[bool, typer.Option("--json", help="Print the full record as JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Go on without a question.")]
MIN_WIDTH = 40
# as verdict_lines in server/render/runs.py has them
BAD_LINES = ("VERDICT worse", "cause: ")


def version_asked(asked: bool) -> None:
    """Print the version and end, where it is asked for."""
    if asked:
        import opd_mcp

        typer.echo(f"opd-mcp {opd_mcp.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=version_asked, is_eager=True)
    ] = False,
) -> None:
    """Distill a student with Lightning OPD: from an MCP client, or with these commands."""


def completed_run(incomplete: str) -> list[str]:
    """The ids of the newest runs that complete a word; none where the workspace cannot be read."""
    from opd_mcp.store.workspace import Workspace

    try:
        directories = sorted(Workspace(workspace_root()).runs.iterdir(), key=os.path.getmtime, reverse=True)
    except OSError:
        return []
    return [path.name for path in directories if path.name.startswith(incomplete)][:50]


RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run id, a name, or latest.", autocompletion=completed_run, show_default=False
    ),
]


def show(found: Shown, as_json: bool, text: Callable[[Shown], str]) -> None:
    """Print a record as JSON, or as its text; what a value holds neither breaks a line nor reaches the terminal."""
    from opd_mcp.schemas.texts import LINE_BREAK

    if as_json:
        typer.echo(found.escaped(keep=LINE_BREAK).to_json())
    else:
        say(text(found.escaped()))


def say(text: str) -> None:
    """Print a text; on a terminal its lines are wrapped at words and a bad verdict is red, elsewhere it is as it is."""
    typer.echo(on_terminal(text, terminal_width()) if sys.stdout.isatty() else text)


def on_terminal(text: str, width: int) -> str:
    """The text wrapped at words, a loss and the cause that a verdict names in red."""
    lines = [(line.startswith(BAD_LINES), wrapped(line, width)) for line in text.splitlines()]
    plain = bool(os.environ.get("NO_COLOR"))
    return "\n".join(typer.style(shown, fg="red") if bad and not plain else shown for bad, shown in lines)


def terminal_width() -> int:
    """The columns of the terminal."""
    import shutil

    return max(shutil.get_terminal_size().columns, MIN_WIDTH)


def wrapped(text: str, width: int) -> str:
    """The text with long lines broken between words, their further lines indented."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        fits = len(line) <= width
        lines += (
            [line]
            if fits
            else textwrap.wrap(
                line,
                width,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
        )
    return "\n".join(lines)


def agree(question: "Question | None", yes: bool) -> None:
    """Ask the user at the terminal; raises PlanError `declined` after a no, and where nobody can be asked."""
    from opd_mcp.schemas.errors import PlanError
    from opd_mcp.schemas.texts import escaped

    if question is None or yes:
        return
    if not sys.stdin.isatty():
        raise PlanError("declined", question.text, fix="Give --yes to go on without a question.")
    if not typer.confirm(wrapped(escaped(question.text), terminal_width())):
        raise PlanError("declined", "Nothing was started or deleted.", fix="Run the command again to change your mind.")


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


def open_service(
    allow_roots: Sequence[Path] = (),
    export_roots: Sequence[Path] = (),
    teacher_hosts: Sequence[str] = (),
    hub_owners: Sequence[str] = (),
) -> "JobService":
    """The service over the workspace; it may read what is below it, the examples and the given folders."""
    from opd_mcp.devices.environment import hub_access
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.service import JobService
    from opd_mcp.store.roots import AllowedRoots

    return JobService(
        open_workspace(),
        AllowedRoots(allow_roots),
        JobSettings(
            teacher_hosts=tuple(teacher_hosts),
            export_roots=tuple(export_roots),
            hub_owners=tuple(hub_owners),
            hub=hub_access(os.environ),
        ),
    )


def error_line(error: "OpdError") -> str:
    """An expected failure in one line, with commands for its calls."""
    from opd_mcp.schemas.texts import escaped
    from opd_mcp.server.tools.table import command_text

    return escaped(error.text(command_text))


def fail(error: "OpdError") -> NoReturn:
    """Print an expected failure on stderr, with commands for its calls, and end with exit status 1."""
    typer.echo(error_line(error), err=True)
    sys.exit(1)
