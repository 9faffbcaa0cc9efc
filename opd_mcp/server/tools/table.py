"""The table of all tools, in the order in which an agent uses them, and the commands that do the same.

To add a tool: its request in schemas/requests.py, its row in its group's file here, its text in server/render/.
Nothing here imports mcp, so that the command line can read it.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opd_mcp.schemas.errors import ArgumentError, nearest
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.server.tools import artifacts, dashboard, follow, plan, start
from opd_mcp.server.tools.spec import ToolSpec

if TYPE_CHECKING:
    from opd_mcp.server.serve import ServerSettings

OPTION_NAMES = {"cache_id": "cache"}
GROUPS: dict[str, tuple[ToolSpec[Any, Any], ...]] = {
    "plan": plan.TOOLS,
    "start": start.TOOLS,
    "follow": follow.TOOLS,
    "artifacts": (artifacts.INSPECT_CACHE, *artifacts.TOOLS),
    "dashboard": dashboard.TOOLS,
}
TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    *plan.TOOLS,
    *start.TOOLS,
    artifacts.INSPECT_CACHE,
    *follow.TOOLS,
    *artifacts.TOOLS,
    *dashboard.TOOLS,
)


def offered_tools(settings: "ServerSettings") -> list[ToolSpec[Any, Any]]:
    """The tools that a server with these settings lists; it knows no others."""
    chosen = [spec for group in settings.groups or GROUPS for spec in GROUPS[group]]
    return [
        spec
        for spec in TOOLS
        if spec in chosen and (spec.read_only or not settings.read_only) and (settings.allow_delete or not spec.deletes)
    ]


def named_groups(texts: Sequence[str]) -> tuple[str, ...]:
    """The groups of tools that `--tools` names, one or more per option; raises ArgumentError `invalid_argument`."""
    names = tuple(dict.fromkeys(name for text in texts for name in text.replace(",", " ").split()))
    for name in names if names or not texts else [""]:
        if name not in GROUPS:
            raise ArgumentError(
                "invalid_argument",
                "There is no such group of tools.",
                value=name,
                nearest=nearest(name, GROUPS),
                fix=f"Name some of: {', '.join(GROUPS)}.",
            )
    return names


def restriction_text(settings: "ServerSettings") -> str:
    """What an agent must know of the tools that its instructions name and this server does not offer."""
    offered = {spec.name for spec in offered_tools(settings)}
    missing = [spec.name for spec in TOOLS if spec.name not in offered and not spec.deletes]
    return f"\nThis server was started without: {', '.join(missing)}." if missing else ""


def unknown_tool_text(name: str, settings: "ServerSettings") -> str:
    """Why a tool cannot be called here: the option of the server that leaves it out, or the nearest names."""
    offered = [spec.name for spec in offered_tools(settings)]
    spec = next((spec for spec in TOOLS if spec.name == name), None)
    if spec is None:
        close = nearest(name, offered)
        named = f"Nearest: {', '.join(close)}. " if close else ""
        return f"Unknown tool: {name[:100]}. {named}Fix: call one that is listed."
    group = next(group for group, specs in GROUPS.items() if spec in specs)
    if settings.groups and group not in settings.groups:
        option = f"only with the groups {', '.join(settings.groups)} (--tools)"
    elif settings.read_only and not spec.read_only:
        option = "with --read-only"
    else:
        option = "without --allow-delete"
    return f"Unknown tool: {name}; this server was started {option}. Fix: the user can start it otherwise."


def command_text(action: NextAction) -> str:
    """A next step as people at a terminal read it, e.g. `Run opd-mcp status x`; empty without a tool."""
    spec = next((spec for spec in TOOLS if spec.name == action.tool), None)
    if spec is None:
        return ""
    if spec.command is None:
        return f"{action.call_text()} in an MCP client of opd-mcp serve"
    values = {name: name.upper() for name in spec.request.model_fields} | action.arguments
    texts = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    words = [spec.command.format(**{name: shlex.join(map(str, parts)) for name, parts in texts.items()})]
    if spec.options:
        others = [name for name in [*(action.missing or ()), *action.arguments] if f"{{{name}}}" not in spec.command]
        words += option_words({name: values[name] for name in others})
    return f"Run opd-mcp {' '.join(words)}"


def option_words(arguments: Mapping[str, Any]) -> Iterator[str]:
    """A plan's or start's arguments as a shell takes them; a plan id comes first and has no name."""
    if "plan_id" in arguments:
        yield shlex.quote(str(arguments["plan_id"]))
    for name, value in arguments.items():
        if name == "overrides" and isinstance(value, str):  # which ones, the caller must say
            yield "--set KEY=VALUE"
        elif name == "overrides":
            for key, setting in value.items():
                yield f"--set {shlex.quote(f'{key}={json.dumps(setting)}')}"
        elif value is True:
            yield f"--{name.replace('_', '-')}"
        elif name in ("baseline", "baselines"):
            yield from (f"--baseline {shlex.quote(each)}" for each in value)
        elif name == "columns":
            yield from (f"--column {shlex.quote(f'{part}={path}')}" for part, path in value.items())
        elif name in ("seeds", "topk"):
            yield f"--{name} {value}"
        elif isinstance(value, str) and name != "plan_id":
            yield f"--{OPTION_NAMES.get(name, name.replace('_', '-'))} {shlex.quote(value)}"
