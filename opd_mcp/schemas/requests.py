"""The arguments of the tools; the server publishes these models as its input schemas, flat."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.schemas.recipes import AskedPreset, CacheDtype, Estimator, ExportFormat, Method, OnTruncated, Preset, Seed
from opd_mcp.schemas.runs import LISTED_AS_TEXT, MAX_TAGS, RunKind, RunName, RunState, Tag

Reference = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=1024),
    Field(description="absolute path, artifact, run or Hub id"),
]
# One model, or several by the domain of their prompts.
Teacher = Annotated[
    Reference | Annotated[dict[Annotated[str, StringConstraints(max_length=40)], Reference], Field(max_length=16)],
    WithJsonSchema({"type": ["string", "object"], "maxLength": 1024, "maxProperties": 16}),
    Field(description="absolute path, artifact, run or Hub id; or some by domain"),
]
SomeTeachers = Annotated[
    Teacher,
    WithJsonSchema(
        {"type": ["string", "object"], "maxLength": 1024, "maxProperties": 16, "description": "or by domain"}
    ),
]
Prompts = Annotated[
    Reference | Annotated[list[Annotated[str, StringConstraints(max_length=20_000)]], Field(max_length=200)],
    Field(description="reference, or up to 200 inline"),
]
# The listing of six tools holds it; only plan_distillation's says what it is, and docs/data.md has the rest.
Columns = Annotated[
    dict[Annotated[str, StringConstraints(max_length=60)], Annotated[str, StringConstraints(max_length=200)]],
    Field(max_length=30),
    WithJsonSchema({"type": "object", "maxProperties": 30}),
]
DescribedColumns = Annotated[Columns, Field(description="e.g. {'answer': 'meta.gold'}")]


@dataclass(frozen=True)
class Bounds:
    """Bounds of a JSON-ready value: levels of nesting, values, characters of one text and of all texts."""

    depth: int
    values: int
    text: int
    characters: int


OVERRIDE_BOUNDS = Bounds(depth=8, values=1_000, text=2_000, characters=2_000_000)


def levels(value: Any) -> Iterator[list[Any]]:
    """A JSON-ready value level by level, so that depth costs no stack: the value, then its members, and so on."""
    level = [value]
    while level:
        yield level
        nested = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [inner for part in nested for inner in part]


def excess(value: Any, bounds: Bounds) -> str | None:
    """How a JSON-ready value exceeds the bounds; None for one within them."""
    values = characters = 0
    for depth, level in enumerate(levels(value), start=1):
        values += len(level)
        if values > bounds.values or depth > bounds.depth:
            return f"more than {bounds.values} values, or nested deeper than {bounds.depth} levels"
        texts = [part for part in level if isinstance(part, str)]
        texts += [str(key) for part in level if isinstance(part, dict) for key in part]
        if any(len(text) > bounds.text for text in texts):
            return f"a text of more than {bounds.text} characters"
        characters += sum(map(len, texts))
        if characters > bounds.characters:
            return f"more than {bounds.characters} characters"
    return None


def bounded(value: Any) -> Any:
    """The JSON-ready value; raises ValueError for one that is too large or too deep, or has too long a text."""
    if found := excess(value, OVERRIDE_BOUNDS):
        raise ValueError(found)
    if any(isinstance(part, int) and abs(part) >= 1 << 63 for level in levels(value) for part in level):
        raise ValueError("a number of more than 64 bits")
    return value


Overrides = Annotated[
    dict[str, Any],
    Field(description="dotted recipe keys, e.g. {'distill.steps': 100}", max_length=100),
    AfterValidator(bounded),
]
RunId = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=200),
    Field(description="a run_id, a name, or 'latest'"),
]
SftPrompts = Annotated[Prompts, Field(description="prompts for SFT on the teacher's responses, run first")]
EvalPrompts = Annotated[Prompts, Field(description="held-out prompts with answers, for the report")]
DeclaredTeacher = Annotated[
    Reference, Field(description="whose responses the student was fine-tuned on, without lineage")
]
AllowMismatch = Annotated[bool, Field(description="train although the SFT teacher differs")]


Name = Annotated[RunName, Field(description="default: what the run does, and how its settings differ")]
Tags = Annotated[
    list[Tag],
    Field(max_length=MAX_TAGS, description="to list, compare and cancel runs by"),
    WithJsonSchema({"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": MAX_TAGS}),
]
Notes = Annotated[str, Field(max_length=2_000)]
Executor = Annotated[str, Field(max_length=40, description="of inspect_setup; default: local")]
Confirm = Annotated[str, Field(max_length=200, description="id of [confirm_needed]")]


Baseline = Literal["live", "sft_more", "opsa"]
MAX_SEEDS = 10


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Baselines = Annotated[
    list[Baseline],
    BeforeValidator(_listed),
    Field(max_length=3, description="arms to run and compare with"),
    # a single name is taken as well
    WithJsonSchema({"type": "array", "items": {"type": "string", "enum": list(get_args(Baseline))}, "maxItems": 3}),
]
Seeds = Annotated[int, Field(ge=1, le=MAX_SEEDS, description="runs per arm")]


class InspectSetup(Schema):
    """Arguments of `inspect_setup`: none."""


class PlanDistillation(Schema):
    """Arguments of `plan_distillation`."""

    student: Reference
    teacher: Teacher
    prompts: Prompts
    sft_prompts: SftPrompts | None = None
    eval_prompts: EvalPrompts | None = None
    columns: DescribedColumns | None = None
    method: Method = "lightning"
    estimator: Estimator = "sampled"
    preset: AskedPreset = "auto"
    declared_teacher: DeclaredTeacher | None = None
    allow_teacher_mismatch: AllowMismatch = False
    baseline: Baselines = Field(default_factory=list)
    seeds: Seeds = 1
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class GenerateTeacherResponses(Schema):
    """Arguments of `generate_teacher_responses`."""

    teacher: Teacher
    prompts: Prompts
    columns: Columns | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class StartSft(Schema):
    """Arguments of `start_sft`."""

    student: Reference
    responses: Reference
    columns: Columns | None = None
    declared_teacher: DeclaredTeacher | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class BuildTeacherCache(Schema):
    """Arguments of `build_teacher_cache`."""

    teacher: Teacher
    student: Reference
    prompts: Prompts
    columns: Columns | None = None
    teacher_url: Annotated[str, Field(max_length=500, description="server of `teacher`")] | None = None
    topk: Annotated[int, Field(ge=0, le=256, description="teacher's top-k log-probs to store")] | None = None
    dtype: CacheDtype | None = None
    on_truncated: OnTruncated | None = None
    declared_teacher: DeclaredTeacher | None = None
    allow_teacher_mismatch: AllowMismatch = False
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None
    confirm: Confirm | None = None


class InspectCache(Schema):
    """Arguments of `inspect_cache`."""

    cache: Annotated[Reference, Field(description="cache id or path")]


class StartDistillation(Schema):
    """Arguments of `start_distillation`: a plan, or a plan's arguments, or a student and a cache."""

    plan_id: Annotated[str, Field(max_length=200, description="of plan_distillation")] | None = None
    student: Reference | None = None
    cache_id: Annotated[Reference, Field(description="teacher cache; instead of teacher and prompts")] | None = None
    teacher: Teacher | None = None
    prompts: Prompts | None = None
    sft_prompts: SftPrompts | None = None
    eval_prompts: EvalPrompts | None = None
    columns: Columns | None = None
    method: Method = "lightning"
    estimator: Estimator = "sampled"
    preset: AskedPreset = "auto"
    declared_teacher: DeclaredTeacher | None = None
    allow_teacher_mismatch: AllowMismatch = False
    benchmark: Annotated[bool, Field(description="end with a report")] = True
    baseline: Baselines = Field(default_factory=list)
    seeds: Seeds = 1
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None
    confirm: Confirm | None = None


MAX_SWEPT = 32
Swept = Annotated[dict[str, Any], AfterValidator(bounded)]


class Sweep(Schema):
    """Arguments of `sweep`: a teacher cache, and the settings to distill its student with."""

    cache_id: Annotated[Reference, Field(description="teacher cache, or the run that made it")]
    grid: Annotated[
        dict[str, Annotated[list[Any], Field(min_length=1, max_length=MAX_SWEPT)]],
        Field(description="values by recipe key, in all combinations", max_length=8),
        AfterValidator(bounded),
        WithJsonSchema({"type": "object", "maxProperties": 8}),
    ] = Field(default_factory=dict)
    points: Annotated[
        list[Swept],
        Field(description="instead: overrides of each run", max_length=MAX_SWEPT),
        WithJsonSchema({"type": "array", "items": {"type": "object", "maxProperties": 100}, "maxItems": MAX_SWEPT}),
    ] = Field(default_factory=list)
    student: Annotated[Reference, Field(description="default: the cache's")] | None = None
    teacher: SomeTeachers | None = None
    eval_prompts: EvalPrompts | None = None
    columns: Columns | None = None
    estimator: Estimator = "sampled"
    preset: AskedPreset = "auto"
    declared_teacher: DeclaredTeacher | None = None
    allow_teacher_mismatch: AllowMismatch = False
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None
    confirm: Confirm | None = None


class BenchmarkStudent(Schema):
    """Arguments of `benchmark_student`."""

    model: Reference
    prompts: Prompts | None = None
    suite: Annotated[str, Field(max_length=120, description="instead: gsm8k, …, lm_eval:TASK")] | None = None
    columns: Columns | None = None
    teacher: SomeTeachers | None = None
    baselines: Annotated[list[Reference], Field(max_length=8)] = Field(default_factory=list)
    samples_per_prompt: Annotated[int, Field(ge=0, le=64, description="0: greedy accuracy only")] | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class AssessOverhead(Schema):
    """Arguments of `assess_overhead`."""

    student: Reference
    teacher: Reference
    prompts: Prompts
    columns: Columns | None = None
    preset: Preset = "quick"
    overrides: Overrides = Field(default_factory=dict)
    executor: Executor | None = None
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class SampleModel(Schema):
    """Arguments of `sample_model`."""

    model: Reference
    prompts: Annotated[
        list[Annotated[str, StringConstraints(max_length=20_000)]],
        Field(min_length=1, max_length=8),
    ]
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, description="0 is greedy")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    seed: Seed = 0
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None


class ExportStudent(Schema):
    """Arguments of `export_student`."""

    model: Reference
    destination: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=1024),
        Field(description="new folder below an export root, or hub:OWNER/NAME"),
    ]
    format: Annotated[ExportFormat, Field(description="dtype, 'input': as stored; adapter alone; gguf")] = "input"
    name: Name | None = None
    tags: Tags = Field(default_factory=list)
    notes: Notes | None = None
    confirm: Confirm | None = None


class GetRunStatus(Schema):
    """Arguments of `get_run_status`."""

    run_id: RunId = "latest"
    wait_seconds: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            json_schema_extra={"maximum": 25},
        ),
    ] = 0


class ListRuns(Schema):
    """Arguments of `list_runs`."""

    state: RunState | None = None
    kind: RunKind | None = None
    name: Annotated[str, Field(max_length=80, description="part of the name")] | None = None
    tag: Annotated[str, Field(max_length=80)] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: Annotated[str, Field(max_length=500, description="next_cursor of the page before")] | None = None


class CancelRun(Schema):
    """Arguments of `cancel_run`."""

    run_id: Annotated[RunId, Field(description="a run_id, 'latest', or a tag or sweep_id: all its active runs")]


class ResumeRun(Schema):
    """Arguments of `resume_run`."""

    run_id: RunId


class GetRunMetrics(Schema):
    """Arguments of `get_run_metrics`."""

    run_ids: Annotated[list[RunId], Field(min_length=1, max_length=4, description="run ids, or 'latest'")] = Field(
        default_factory=lambda: ["latest"]
    )
    keys: Annotated[
        list[Annotated[str, StringConstraints(max_length=100)]],
        Field(max_length=20, description="e.g. 'distill.reverse_kl_k1' or 'reverse_kl_k1'; default: all"),
    ] = Field(default_factory=list)
    max_points: Annotated[int, Field(ge=2, le=200, description="points per series")] = 40


MAX_COMPARED = 32


class CompareRuns(Schema):
    """Arguments of `compare_runs`: some runs, or a tag that they share."""

    run_ids: Annotated[list[RunId], Field(max_length=MAX_COMPARED)] = Field(default_factory=list)
    tag: Annotated[str, Field(max_length=80, description="instead: all runs with this tag")] | None = None


class GetRunLogs(Schema):
    """Arguments of `get_run_logs`."""

    run_id: RunId = "latest"
    tail: Annotated[int, Field(ge=1, le=200, description="lines")] = 50
    contains: Annotated[str, Field(max_length=200, description="only lines with this text")] | None = None
    cursor: Annotated[str, Field(max_length=500, description="next_cursor of the page before")] | None = None


class ListArtifacts(Schema):
    """Arguments of `list_artifacts`."""

    kind: ArtifactKind | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    cursor: Annotated[str, Field(max_length=500, description="next_cursor of the page before")] | None = None


class DeleteArtifact(Schema):
    """Arguments of `delete_artifact`."""

    artifact_id: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
    confirm: Confirm | None = None


class DeleteRun(Schema):
    """Arguments of `delete_run`."""

    run_id: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
    confirm: Confirm | None = None


class OpenDashboard(Schema):
    """Arguments of `open_dashboard`; an active run, else the newest one, by default."""

    run_ids: Annotated[list[RunId], Field(max_length=4)] = Field(default_factory=list)


class ReadDashboard(Schema):
    """Arguments of `dashboard_feed`: the runs to show in full, and which page of which runs to list."""

    run_ids: Annotated[list[RunId], Field(max_length=8)] = Field(default_factory=list)
    state: Annotated[RunState, LISTED_AS_TEXT] | None = None
    kind: Annotated[RunKind, LISTED_AS_TEXT] | None = None
    name: Annotated[str, Field(max_length=80)] | None = None
    tag: Annotated[str, Field(max_length=80)] | None = None
    cursor: Annotated[str, Field(max_length=500)] | None = None
