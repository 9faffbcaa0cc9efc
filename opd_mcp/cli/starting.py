"""What plans and starts runs: plan, start, sweep, export."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from opd_mcp.cli.shared import STARTS, AsJson, Yes, agree, audited, command, open_service, show

if TYPE_CHECKING:
    from opd_mcp.service import JobService

GPU_HOURS = 8.0
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A folder, an artifact, a run, or a Hub id.", show_default=False)
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="As student; several by domain: math=MODEL,code=MODEL.", show_default=False),
]
Data = Annotated[
    str | None, typer.Option(metavar="DATA", help="A file, an artifact, or a Hub data set.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A recipe key, e.g. distill.steps=100; repeatable."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="PART=FIELD", help="E.g. prompt=question, eval_prompts.answer=gold; repeatable."),
]
Mismatch = Annotated[bool, typer.Option("--allow-teacher-mismatch", help="Train although the SFT teacher differs.")]
Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", metavar="ARM", help="live, sft_more or opsa: also run and compare with; repeatable."),
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each arm, each with a seed of its own.")]
Place = Annotated[
    str | None, typer.Option("--executor", metavar="NAME", help="Of settings.toml, e.g. a cluster; default: here.")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="What the run is called.", show_default=False)]
Tags = Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="TAG", help="To find runs by; repeatable.")]
Notes = Annotated[str | None, typer.Option(metavar="NOTES", help="What you want to remember.", show_default=False)]


class Method(StrEnum):
    """How the student learns."""

    LIGHTNING = "lightning"
    LIVE = "live"
    SFT = "sft"


class Preset(StrEnum):
    """The size of a run."""

    AUTO = "auto"
    QUICK = "quick"
    PAPER = "paper"
    DEMO = "demo"


How = Annotated[Method, typer.Option(metavar="METHOD", help="lightning, live or sft.")]
Size = Annotated[Preset, typer.Option(metavar="PRESET", help="auto, quick, paper or demo: how large a run is.")]
NamedSize = Annotated[
    Preset, typer.Option(metavar="PRESET", help="quick, paper or demo: the settings that are not named.")
]
Objective = Annotated[
    str, typer.Option(metavar="ESTIMATOR", help="What is minimised, e.g. sampled or topk_reverse_kl (docs/method.md).")
]


@command(rich_help_panel=STARTS)
def plan(  # noqa: PLR0913  a command's options are its parameters
    student: Model = None,
    teacher: Teacher = None,
    prompts: Data = None,
    sft_prompts: Data = None,
    eval_prompts: Data = None,
    columns: Columns = None,
    method: How = Method.LIGHTNING,
    estimator: Objective = "sampled",
    preset: Size = Preset.AUTO,
    declared_teacher: Model = None,
    allow_teacher_mismatch: Mismatch = False,
    baseline: Baselines = None,
    seeds: Seeds = 1,
    settings: Settings = None,
    executor: Place = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    as_json: AsJson = False,
) -> None:
    """Show what a distillation would do and cost; start it by its plan id. Exits with 1 where something blocks it."""
    from opd_mcp.schemas.requests import PlanDistillation
    from opd_mcp.server.render.plans import plan_text
    from opd_mcp.server.tools.table import command_text

    service, request = request_of("plan", PlanDistillation, _distillation(locals()))
    found = service.plan(request)
    show(found, as_json, lambda plan: plan_text(plan, command_text))
    if found.blocking:
        raise typer.Exit(1)


@command(rich_help_panel=STARTS)
def start(  # noqa: PLR0913  a command's options are its parameters
    plan_id: Annotated[str | None, typer.Argument(metavar="PLAN", help="A plan id.", show_default=False)] = None,
    student: Model = None,
    teacher: Teacher = None,
    prompts: Data = None,
    sft_prompts: Data = None,
    eval_prompts: Data = None,
    columns: Columns = None,
    cache: Annotated[str | None, typer.Option(metavar="CACHE", help="A teacher cache, with --student.")] = None,
    method: How = Method.LIGHTNING,
    estimator: Objective = "sampled",
    preset: Size = Preset.AUTO,
    declared_teacher: Model = None,
    allow_teacher_mismatch: Mismatch = False,
    baseline: Baselines = None,
    seeds: Seeds = 1,
    settings: Settings = None,
    executor: Place = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Start a plan, or a distillation by the options of a plan; it runs in the background."""
    from opd_mcp.schemas.requests import StartDistillation
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    given = _distillation(locals()) | {"plan_id": plan_id, "cache_id": cache}
    service, request = request_of("start", StartDistillation, given)
    agree(service.start_question(request, GPU_HOURS), yes)
    found = audited(service, "start_distillation", request.to_dict(), lambda: service.start_distillation(request))
    show(found, as_json, lambda found: snapshot_text(found, command_text))


@command(rich_help_panel=STARTS)
def sweep(  # noqa: PLR0913  a command's options are its parameters
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A teacher cache, or the run that made it.")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", "-g", metavar="KEY=A,B", help="Values of a recipe key; repeatable, all combinations."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option("--point", "-p", metavar="KEY=A KEY=B", help="Instead: the settings of one run; repeatable."),
    ] = None,
    student: Model = None,
    eval_prompts: Data = None,
    preset: Size = Preset.AUTO,
    settings: Settings = None,
    executor: Place = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Start a distillation per point of a grid or list, all from one cache; compare them at the end."""
    from opd_mcp.schemas.requests import Sweep
    from opd_mcp.server.render.runs import sweep_text
    from opd_mcp.server.tools.table import command_text

    values = {key: _list(text) for key, text in pairs(grid)}
    points = [parsed_settings(text.split()) for text in point or ()]
    given = named(locals(), "student", "eval_prompts") | {"cache_id": cache, "grid": values, "points": points}
    given |= labels(name, tags, notes) | {"preset": preset.value, "overrides": parsed_settings(settings)}
    given["executor"] = executor
    service, request = request_of("sweep", Sweep, given)
    agree(service.sweep_question(request, GPU_HOURS), yes)
    found = audited(service, "sweep", request.to_dict(), lambda: service.sweep(request))
    show(found, as_json, lambda found: sweep_text(found, command_text))


class Form(StrEnum):
    """How a model is exported."""

    INPUT = "input"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    ADAPTER = "adapter"
    GGUF = "gguf"


@command(rich_help_panel=STARTS)
def export(
    model: Annotated[str, typer.Argument(help="A run id, an artifact id, a Hub id or a directory.")],
    destination: Annotated[str, typer.Argument(help="A new directory, or hub:OWNER/NAME.")],
    form: Annotated[Form, typer.Option("--format", help="Dtype, the adapter alone, or gguf.")] = Form.INPUT,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with tokenizer and model card to a new directory or private repository, in the background."""
    from opd_mcp.schemas.requests import ExportStudent
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    source, uploads = Path(model), destination.startswith("hub:")
    reference = str(source.resolve()) if source.is_dir() else model
    target = destination if uploads else str(Path(destination).absolute())
    owners = (destination.removeprefix("hub:").partition("/")[0],) if uploads else ()
    roots = [] if uploads else [Path(target).parent]
    service = open_service([source] if source.is_dir() else [], roots, hub_owners=owners)
    request = ExportStudent(model=reference, destination=target, format=form.value)
    agree(service.export_question(request), yes)
    found = audited(service, "export_student", request.to_dict(), lambda: service.export_student(request))
    show(found, as_json, lambda found: snapshot_text(found, command_text))


def parsed_settings(texts: Sequence[str] | None) -> dict[str, Any]:
    """Recipe keys with their values, from `key=value`; a value is JSON, or else a text."""
    return {key: _value(text) for key, text in pairs(texts)}


def pairs(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Names with their texts, from `name=text`; raises ArgumentError `invalid_argument`."""
    from opd_mcp.schemas.errors import ArgumentError

    pairs = []
    for text in texts or ():
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ArgumentError(
                "invalid_argument", "A setting is written key=value.", value=text, fix="E.g. --set distill.steps=100."
            )
        pairs.append((key.strip(), value.strip()))
    return pairs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _list(text: str) -> list[Any]:
    """Values between commas; a JSON list as it is."""
    parsed = _value(text)
    return parsed if isinstance(parsed, list) else [_value(part.strip()) for part in text.split(",")]


def named(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The named options, or all, as arguments; what is a file or folder here is given by its absolute path."""
    given = {name: values[name] for name in names or values if values[name] is not None}
    return {name: _teachers(value) if name == "teacher" else _absolute(value) for name, value in given.items()}


def _absolute(value: Any) -> Any:
    """The absolute path of a file or folder here, any other value as it is; raises PathError `not_found` as below."""
    if not isinstance(value, str):
        return value
    if _is_path(value):
        return str(Path(value).resolve())
    _require_no_missing_folder(value)
    return value


def _require_no_missing_folder(text: str) -> None:
    """Raise PathError `not_found`, with the nearest names, for what can only be a path, whose folder is not there."""
    from opd_mcp.identity.data.sources import is_glob
    from opd_mcp.planning.references import FILE_SUFFIXES
    from opd_mcp.store.roots import AllowedRoots

    path = Path(text)
    if is_glob(text):
        return
    # Two parts without a suffix may be a Hub id, one the name of a run.
    if len(path.parts) > 2 or path.is_absolute() or text.startswith(".") or text.endswith(FILE_SUFFIXES):
        real = path.absolute()
        folder = next(parent for parent in real.parents if parent.is_dir())
        AllowedRoots([folder]).resolve(real)


def _teachers(text: str) -> str | dict[str, str]:
    """A teacher, or several by domain: `math=MODEL,code=MODEL`."""
    pairs = [part.partition("=") for part in text.split(",")]
    if _is_path(text) or not all(domain and equals for domain, equals, _ in pairs):
        return str(_absolute(text))
    return {domain.strip(): _absolute(model.strip()) for domain, _, model in pairs}


def _is_path(text: str) -> bool:
    """Whether a text means something here: a file, a folder, or a mistyped name next to some."""
    path = Path(text)
    return path.exists() or (len(path.parts) > 1 and path.parent.is_dir())


def _distillation(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a distillation, from the options that plan and start share."""
    given = named(options, "student", "teacher", "prompts", "sft_prompts", "eval_prompts", "declared_teacher")
    given |= {"method": options["method"].value, "preset": options["preset"].value}
    given |= {name: options[name] for name in ("estimator", "allow_teacher_mismatch", "seeds")}
    given |= {"baseline": options["baseline"] or [], "executor": options["executor"]}
    given["columns"] = dict(pairs(options["columns"])) or None
    return (
        given
        | {"overrides": parsed_settings(options["settings"])}
        | labels(options["name"], options["tags"], options["notes"])
    )


def labels(name: str | None, tags: list[str] | None, notes: str | None) -> dict[str, Any]:
    """What a run is called, as arguments."""
    return {"name": name, "tags": tags or [], "notes": notes}


def _texts(value: Any) -> list[Any]:
    """A value, the items of a list, or the models of several teachers."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def request_of(command: str, model: type[Any], given: dict[str, Any]) -> "tuple[JobService, Any]":
    """The typed request, and the service that may read the files that the user names.

    Those that a plan or a cache's run has read were named by a user as well.
    """
    from opd_mcp.server.protocol.arguments import request_from_arguments

    request = request_from_arguments(f"opd-mcp {command}", model, given)
    texts = [text for value in given.values() for text in _texts(value)]
    files = [text for text in texts if isinstance(text, str) and text.startswith("/")]
    recorded = open_service().paths_behind(given.get("plan_id"), given.get("cache_id"))
    paths = [Path(value) for value in [*files, *recorded]]
    roots = [path if path.is_dir() else path.parent for path in paths]
    host = urlsplit(given.get("teacher_url") or "").hostname
    return open_service([root for root in roots if root.is_dir()], teacher_hosts=[host] if host else []), request
