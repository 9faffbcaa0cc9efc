"""What starts a single stage: responses, sft, cache build, benchmark, sample, assess."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_mcp.cli.caches import cache_command
from opd_mcp.cli.shared import STARTS, AsJson, Yes, agree, audited, command, show
from opd_mcp.cli.starting import (
    Columns,
    Data,
    Mismatch,
    Model,
    Name,
    NamedSize,
    Notes,
    Place,
    Preset,
    Settings,
    Tags,
    labels,
    named,
    pairs,
    parsed_settings,
    request_of,
)

if TYPE_CHECKING:
    from opd_mcp.schemas.runs import RunSnapshot
    from opd_mcp.service import JobService

POLL_SECONDS = 0.3
Measured = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, an artifact, a run, or a Hub id.")]


@command(rich_help_panel=STARTS)
def responses(  # noqa: PLR0913  a command's options are its parameters
    teacher: Model = None,
    prompts: Data = None,
    columns: Columns = None,
    preset: NamedSize = Preset.QUICK,
    settings: Settings = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    executor: Place = None,
    as_json: AsJson = False,
) -> None:
    """Let a teacher answer prompts, for sft."""
    from opd_mcp.schemas.requests import GenerateTeacherResponses

    given = named(locals(), "teacher", "prompts") | _stage(locals())
    service, request = request_of("responses", GenerateTeacherResponses, given)
    _show_started(service, "generate_teacher_responses", request, as_json)


@command(rich_help_panel=STARTS)
def sft(  # noqa: PLR0913  a command's options are its parameters
    student: Model = None,
    responses: Annotated[
        str | None, typer.Option(metavar="DATA", help="A file, an artifact, or the run that made them.")
    ] = None,
    declared_teacher: Model = None,
    columns: Columns = None,
    preset: NamedSize = Preset.QUICK,
    settings: Settings = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    executor: Place = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a student on responses."""
    from opd_mcp.schemas.requests import StartSft

    given = named(locals(), "student", "responses", "declared_teacher") | _stage(locals())
    service, request = request_of("sft", StartSft, given)
    _show_started(service, "start_sft", request, as_json)


@cache_command("build")
def build(  # noqa: PLR0913  a command's options are its parameters
    teacher: Model = None,
    student: Model = None,
    prompts: Data = None,
    columns: Columns = None,
    teacher_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The server that scores; its key is in OPD_TEACHER_KEY.")
    ] = None,
    topk: Annotated[int | None, typer.Option(min=0, max=256, help="Top-k log-probs to store for each token.")] = None,
    declared_teacher: Model = None,
    allow_teacher_mismatch: Mismatch = False,
    preset: NamedSize = Preset.QUICK,
    settings: Settings = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    executor: Place = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Draw a student's rollouts and store the teacher's log-probs of them, in the background."""
    from opd_mcp.schemas.requests import BuildTeacherCache

    given = named(locals(), "teacher", "student", "prompts", "declared_teacher") | _stage(locals())
    given |= {"teacher_url": teacher_url, "topk": topk, "allow_teacher_mismatch": allow_teacher_mismatch}
    service, request = request_of("cache build", BuildTeacherCache, given)
    agree(service.cache_question(request), yes)
    _show_started(service, "build_teacher_cache", request, as_json)


@command(rich_help_panel=STARTS)
def benchmark(  # noqa: PLR0913  a command's options are its parameters
    model: Measured,
    prompts: Data = None,
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="Instead of prompts, e.g. gsm8k (docs/benchmarks.md).")
    ] = None,
    teacher: Model = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", metavar="MODEL", help="To compare with; repeatable.")
    ] = None,
    columns: Columns = None,
    preset: NamedSize = Preset.QUICK,
    settings: Settings = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    executor: Place = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on prompts with answers, against others."""
    from opd_mcp.schemas.requests import BenchmarkStudent

    others = named({str(number): text for number, text in enumerate(baseline or ())})
    given = named(locals(), "model", "prompts", "teacher") | _stage(locals())
    given |= {"suite": suite, "baselines": [*others.values()]}
    service, request = request_of("benchmark", BenchmarkStudent, given)
    _show_started(service, "benchmark_student", request, as_json)


@command(rich_help_panel=STARTS)
def sample(
    model: Measured,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Up to 8 texts.")],
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0, max=10)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1, max=4096)] = 256,
    seed: Annotated[int, typer.Option(help="Another seed, other answers.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask a model, and wait for its answers; Ctrl-C leaves the run to itself."""
    from opd_mcp.schemas.requests import SampleModel
    from opd_mcp.schemas.runs import ACTIVE_STATES
    from opd_mcp.server.render.runs import status_text
    from opd_mcp.server.tools.table import command_text

    given = named(locals(), "model") | {"prompts": prompts, "temperature": temperature, "seed": seed}
    service, request = request_of("sample", SampleModel, given | {"max_new_tokens": max_new_tokens})
    started = _started(service, "sample_model", request)
    while service.status(started.run_id).state in ACTIVE_STATES:
        time.sleep(POLL_SECONDS)
    show(service.status(started.run_id), as_json, lambda found: status_text(found, command_text))


@command(rich_help_panel=STARTS)
def assess(  # noqa: PLR0913  a command's options are its parameters
    student: Model = None,
    teacher: Model = None,
    prompts: Data = None,
    columns: Columns = None,
    preset: NamedSize = Preset.QUICK,
    settings: Settings = None,
    name: Name = None,
    tags: Tags = None,
    notes: Notes = None,
    executor: Place = None,
    as_json: AsJson = False,
) -> None:
    """Measure two models here: what live and lightning cost, and whether the pair will work."""
    from opd_mcp.schemas.requests import AssessOverhead

    given = named(locals(), "student", "teacher", "prompts") | _stage(locals())
    service, request = request_of("assess", AssessOverhead, given)
    _show_started(service, "assess_overhead", request, as_json)


def _stage(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that every stage's start has."""
    given = {"preset": options["preset"].value, "overrides": parsed_settings(options["settings"])}
    given |= labels(options["name"], options["tags"], options["notes"])
    return given | {"columns": dict(pairs(options["columns"])) or None, "executor": options["executor"]}


def _started(service: "JobService", tool: str, request: Any) -> "RunSnapshot":
    return audited(service, tool, request.to_dict(), lambda: getattr(service, tool)(request))


def _show_started(service: "JobService", tool: str, request: Any, as_json: bool) -> None:
    """Start a run by its tool's name, and show it."""
    from opd_mcp.server.render.runs import snapshot_text
    from opd_mcp.server.tools.table import command_text

    show(_started(service, tool, request), as_json, lambda found: snapshot_text(found, command_text))
