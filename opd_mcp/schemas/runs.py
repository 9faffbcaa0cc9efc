"""Run records: the immutable request, the journal's lines, and what a status call answers."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, WithJsonSchema, model_validator

from opd_mcp.schemas.base import Record, Schema, unchanged
from opd_mcp.schemas.executors import LOCAL, ExecutorName, ExecutorSettings
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.recipes import ExportFormat, Recipe

TrackerName = Literal["trackio", "wandb", "tensorboard", "mlflow"]
RunKind = Literal["generate", "sft", "cache", "distill", "benchmark", "sample", "export", "assess"]
RunState = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]
PhaseName = Literal[
    "fetch", "generate_responses", "sft", "rollout", "score", "distill", "benchmark", "sample", "export", "assess"
]
ACTIVE_STATES: frozenset[RunState] = frozenset({"queued", "running"})
FINAL_STATES: frozenset[RunState] = frozenset({"succeeded", "failed", "cancelled"})
LISTED_AS_TEXT = WithJsonSchema({"type": "string", "maxLength": 40})
"""For an answer's names that no caller chooses between: the listing of tools spares their enumeration."""
LM_EVAL = "lm_eval:"
"""How the name of a suite begins that is a task of lm-eval."""
TOKENIZER_FOLDER = "tokenizer"
"""Where responses, rollouts and caches keep the tokenizer and template that they were made with."""


class HubSizes(Schema):
    """What the Hub says of a model that is not here yet; estimates are made by it, and nothing else."""

    parameters: int
    weight_bytes: int
    download_bytes: int = Field(description="of all files that the run fetches")
    settings: dict[str, int] = Field(description="of its config.json: those that memory and time depend on")


class ModelInput(Schema):
    """A model as resolved for a run."""

    reference: str = Field(description="what the caller gave")
    path: str | None = Field(None, description="absolute; absent for a Hub id that the worker still fetches")
    hub_id: str | None = None
    url: str | None = Field(None, description="a teacher's server; its key is in the environment only")
    identity: ModelIdentity | None = None
    artifact_id: str | None = None
    sft_teacher: TeacherClaim | None = None
    parameters: int | None = None
    hub_sizes: HubSizes | None = Field(None, description="of a Hub model that is still to be fetched")
    members: dict[str, "ModelInput"] | None = Field(
        None, description="several teachers by domain; `path` is that of the one whose tokenizer and template count"
    )

    @property
    def given(self) -> str | dict[str, str]:
        """What the caller gave, as an argument of a call."""
        if not self.members:
            return self.reference
        return {domain: member.reference for domain, member in self.members.items()}

    @property
    def sees_more(self) -> bool:
        """Whether it is a teacher that sees more than its student."""
        return self.identity is not None and self.identity.context is not None


class SkippedRow(Schema):
    """A row that cannot be used."""

    place: str = Field(description="file and line, or file and row of a table, from 1")
    reason: str


class UnderstoodData(Schema):
    """How a data set was read."""

    shape: str = Field(description="e.g. 'question/answer'; 'columns' where the caller named them; docs/data.md")
    columns: dict[str, str] = Field(default_factory=dict, description="path of the field that each part is read from")
    unused: list[str] = Field(default_factory=list, description="fields that are not read")
    files: int = 1
    rows: int = Field(0, description="rows that can be used")
    skipped: int = Field(0, description="rows that cannot be used and are left out")
    skipped_by_reason: dict[str, int] = Field(default_factory=dict)
    skipped_rows: list[SkippedRow] = Field(default_factory=list, description="the first of them")
    notes: list[str] = Field(default_factory=list)

    @property
    def skipped_share(self) -> float:
        """Skipped rows as a share of all, from 0 to 1."""
        return self.skipped / max(self.rows + self.skipped, 1)


class DataInput(Schema):
    """Prompts or responses as resolved for a run."""

    reference: str
    path: str | None = None
    hub_id: str | None = None
    artifact_id: str | None = None
    sha256: str | None = None
    rows: int | None = None
    rows_with_answer: int | None = None
    mean_prompt_tokens: float | None = None
    columns: dict[str, str] | None = Field(None, description="fields by part, as the caller named them")
    understood: UnderstoodData | None = Field(None, description="how it was read; absent for data still to be fetched")
    sft_teacher: TeacherClaim | None = None


class ModelOrigin(Schema):
    """A model that another one was made of, for the other one's card."""

    role: Literal["teacher", "student"]
    name: str = Field(description="its Hub id, else the last part of its path")
    path: str | None = Field(None, description="where its own card and licence may be read")


class DataOrigin(Schema):
    """A data set that a model was made with."""

    role: str
    name: str = Field(description="its Hub id, else the name of its file or artifact")
    rows: int | None = None
    sha256: str | None = None


class ExportTarget(Schema):
    """What a run exports: where to, in which form, and what its card tells besides the lineage."""

    destination: str = Field(description="absolute, below an export root; or hub:OWNER/NAME; made by the run")
    format: ExportFormat = "input"
    report: str | None = Field(None, description="the directory of the newest report on this model")
    models: list[ModelOrigin] = Field(default_factory=list)
    data: list[DataOrigin] = Field(default_factory=list)

    @property
    def hub_id(self) -> str | None:
        """OWNER/NAME of the Hub's repository that it makes; None for a directory."""
        return self.destination.removeprefix("hub:") if self.destination.startswith("hub:") else None


class RunInputs(Schema):
    """Every input of a run; absent ones are made by an earlier phase or not needed."""

    student: ModelInput | None = None
    teacher: ModelInput | None = None
    prompts: DataInput | None = None
    sft_prompts: DataInput | None = None
    eval_prompts: DataInput | None = None
    responses: DataInput | None = None
    cache: DataInput | None = None
    model: ModelInput | None = Field(
        None, description="the model that a benchmark measures, that answers samples or that is exported"
    )
    baselines: list[ModelInput] = Field(default_factory=list)
    suite: str | None = Field(None, description="of a benchmark: a suite by name, or lm_eval:TASK")
    declared_teacher: str | None = None
    sft_teacher_path: str | None = Field(None, description="where the SFT teacher is at hand, to measure Δ")
    allow_teacher_mismatch: bool = False
    export: ExportTarget | None = None


def skipped_prompts(recipe: Recipe, inputs: RunInputs) -> int:
    """How many of the first evaluation prompts a distillation is judged by in its training."""
    judged = inputs.eval_prompts is not None and inputs.model is None and recipe.distill.evaluate_steps is not None
    return recipe.distill.evaluate_prompts if judged else 0


RunName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
Tag = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,59}$")]
MAX_TAGS = 10


class RunLabels(Schema):
    """What people call a run; it is in no phase's key and in no request's hash."""

    name: RunName | None = Field(None, description="as given, else what the run does and how its recipe differs")
    tags: list[Tag] = Field(default_factory=list)
    notes: str | None = None


def phase_label(name: str, number: int | None) -> str:
    """What a phase is called: its name, from the second of several rounds on with the round's number."""
    return name if number is None or number == 1 else f"{name} {number}"


class RunPhase(Schema):
    """One phase of a run in the order of execution."""

    name: PhaseName
    key: str
    satisfied_by: str | None = None
    round: int | None = Field(None, description="of several rounds, the one that it belongs to, from 1")

    @property
    def label(self) -> str:
        """Its name, told apart from that of other rounds."""
        return phase_label(self.name, self.round)


class RunRequest(Schema):
    """What a run was asked to do; its content hash makes starts idempotent."""

    kind: RunKind
    recipe: Recipe
    inputs: RunInputs
    phases: list[RunPhase]
    plan_id: str | None = None
    labels: RunLabels = RunLabels()
    executor: str | None = Field(None, description="whose machines it runs on, as the settings name it; absent: here")

    @property
    def skipped_prompts(self) -> int:
        """The evaluation prompts that judge a student in its training, and so are no evidence of it."""
        return skipped_prompts(self.recipe, self.inputs)


class RunRecord(Record):
    """`run.json`: immutable."""

    upgrades = (unchanged, unchanged)  # 2: sealed, with the memory that was expected; 3: labels
    run_id: str
    created_at: str = Field(description="also the moment that chat templates with a clock write, in every attempt")
    request_hash: str
    request: RunRequest
    versions: dict[str, str]
    hardware: str
    expected_seconds: float | None = None
    expected_memory_bytes: int | None = Field(None, description="peak, as the plan estimated it")
    expected_phase_seconds: dict[str, float] = Field(default_factory=dict, description="by phase; what the ETA uses")
    trace_context: dict[str, str] = Field(default_factory=dict, description="W3C trace context of the tool call")


class Quotas(Schema):
    """Limits on the runs of a workspace; absent means unlimited."""

    max_running_runs: int | None = Field(None, ge=1, description="runs that are queued or running at a time")
    max_gpu_hours: float | None = Field(None, gt=0, description="hours that one run holds its device, all attempts")
    max_bytes: int | None = Field(None, ge=1, description="size of the whole workspace")


class StopSettings(Schema):
    """How a worker that does not answer is ended."""

    grace_seconds: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="from a cancel request to SIGTERM, and from SIGTERM to SIGKILL"
    )


class EngineSettings(Schema):
    """Engines that workers may start: programs in environments of their own."""

    vllm: str | None = Field(None, description="absolute path of `vllm`, or of a Python that has it")
    sglang: str | None = Field(None, description="absolute path of a Python that has SGLang")
    start_seconds: float = Field(900.0, gt=0, allow_inf_nan=False, description="until an engine answers")
    restarts: int = Field(3, ge=0, le=100, description="how often an engine that ends is started again in a phase")

    def program(self, kind: str) -> str | None:
        """The path for an engine's name; None where there is none."""
        return {"vllm": self.vllm, "sglang": self.sglang}.get(kind)


class ExportSettings(Schema):
    """Where models may be exported to, besides the folders of `serve --export-root`."""

    roots: list[str] = Field(default_factory=list, description="absolute paths of folders")
    hub: list[str] = Field(default_factory=list, description="owners on the Hub that models may be uploaded for")
    gguf_converter: str | None = Field(
        None, description="absolute path of convert_hf_to_gguf.py in a checkout of llama.cpp"
    )
    gguf_python: str | None = Field(
        None, description="absolute path of the Python that runs it; default: the one that this program runs in"
    )


class TrackingSettings(Schema):
    """The experiment trackers that the journals of runs are mirrored to; secrets come from the environment only."""

    trackers: list[TrackerName] = Field(default_factory=list, description="any of trackio, wandb, tensorboard, mlflow")
    project: str = Field("opd-mcp", min_length=1, max_length=100, description="what the runs are grouped under there")
    offline: bool = Field(False, description="nothing leaves this machine, whatever a tracker's own settings say")
    trackio_space: str | None = Field(None, description="OWNER/NAME of the Hub's Space that trackio sends to")
    mlflow_uri: str | None = Field(None, description="MLflow's server; default: MLFLOW_TRACKING_URI, else a local file")
    keep_trying_hours: float = Field(
        24.0, ge=0, allow_inf_nan=False, description="how long a tracker that does not answer is tried after a run"
    )

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, values: object) -> object:
        return {"trackers": values} if isinstance(values, list) else values


class WorkspaceSettings(Schema):
    """The settings file of a workspace."""

    quotas: Quotas = Quotas()
    stop: StopSettings = StopSettings()
    engines: EngineSettings = EngineSettings()
    export: ExportSettings = ExportSettings()
    tracking: TrackingSettings = Field(TrackingSettings(), description="a table, or the names of trackers alone")
    executors: dict[ExecutorName, ExecutorSettings] = Field(
        default_factory=dict, description="by name, where runs may be placed besides this machine"
    )
    index_folder: str | None = Field(
        None, pattern="^/", description="where this machine keeps its index of a workspace that others share"
    )

    @model_validator(mode="after")
    def _named(self) -> "WorkspaceSettings":
        if LOCAL in self.executors:
            raise ValueError(f"executors.{LOCAL} is this machine, which needs no settings")
        return self


class Progress(Schema):
    """Progress of the current phase."""

    done: int
    total: int
    unit: str
    eta_s: float | None = None
    rate: float | None = Field(None, description="units per second")


class Failure(Schema):
    """Why a run failed and what to do; `call` belongs to the fix."""

    code: str
    cause: str
    fix: str
    call: NextAction | None = None
    override: dict[str, Any] | None = Field(None, description="for the next start")
    log_tail: list[str] = Field(default_factory=list)


class MetricTrend(Schema):
    """The latest value of a metric, and its trend."""

    last: float | None = None
    trend: Literal["up", "down", "flat"] | None = None


class Alert(Schema):
    """Something the caller should look at while the run continues."""

    time: str
    code: str
    message: str


class RunSnapshot(Schema):
    """The answer of every tool that starts or stops a run; a task's final result has the same form."""

    run_id: str
    kind: RunKind
    state: RunState
    phase: PhaseName | None = None
    name: str | None = None
    progress: Progress | None = None
    reused: bool = False
    note: str | None = Field(None, description="what the caller may not expect")
    cache_id: str | None = Field(None, description="id that the teacher cache of this run has or will have")
    result: dict[str, Any] | None = Field(None, description="of an ended run")
    error: Failure | None = None
    next_action: NextAction


class RunStatus(Schema):
    """The answer of `get_run_status`."""

    run_id: str
    kind: Annotated[RunKind, LISTED_AS_TEXT]
    state: RunState
    name: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    created_at: str
    updated_at: str
    phase: Annotated[PhaseName, LISTED_AS_TEXT] | None = None
    phases_done: list[str] = Field(default_factory=list)
    phases_total: int
    progress: Progress | None = None
    queue_position: int | None = None
    waits_for: str | None = None
    cancel_requested: str | None = Field(None, description="pending until cancelled")
    eta_s: float | None = Field(None, description="to the end of all phases")
    elapsed_s: float | None = None
    metrics: dict[str, MetricTrend] = Field(default_factory=dict, description="of this phase")
    alerts: list[Alert] = Field(default_factory=list)
    result: dict[str, Any] | None = Field(None, description="artifact ids, paths, figures")
    error: Failure | None = None
    unchanged: bool = False
    next_check_s: float | None = None
    next_action: NextAction = Field(description="tool, arguments, why")


class RunRow(Schema):
    """A run in a list."""

    run_id: str
    kind: RunKind
    state: RunState
    name: str | None = None
    tags: list[str] | None = None
    note: str | None = Field(None, description="of an active run, its process; of a succeeded one, its judgement")
    created_at: str
    student: str | None = None
    teacher: str | None = None


class RunList(Schema):
    """A page of runs, newest first."""

    rows: list[RunRow]
    total: int
    next_cursor: str | None = None
    damaged: list[str] | None = Field(None, description="runs left out: their record cannot be read")
