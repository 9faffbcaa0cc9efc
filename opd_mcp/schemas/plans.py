"""Plans: what would run, on what basis, and what blocks it."""

from typing import Any, Literal, Self

from pydantic import Field

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.cache import EngineGap, PromptHygiene, RolloutStatistics, TeacherDelta
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.memory import CheckpointingPolicy
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.recipes import GraderName, Recipe
from opd_mcp.schemas.reports import Assessment
from opd_mcp.schemas.runs import PhaseName, RunInputs


class PlannedPhase(Schema):
    """One phase of a run; `satisfied_by` names the artifact that already holds its result."""

    name: PhaseName
    key: str = Field(description="hash of the recipe section and every input; equal key, equal result")
    satisfied_by: str | None = None
    round: int | None = None


class PhaseEstimate(Schema):
    """Cost of one phase; `basis` says where the numbers come from."""

    phase: str
    flops: float
    seconds: float
    basis: str
    memory_bytes: int | None = Field(None, description="its peak: only of the models that it loads")
    batch_size: int | None = Field(None, description="rows that it generates at a time, by the memory of the device")
    kv_cache_bytes: int | None = Field(None, description="keys and values of such a batch at full length")
    download_bytes: int | None = Field(None, description="of a fetch")
    start_seconds: float | None = Field(None, description="of its seconds those until its managed engine answers")


class MethodEstimate(Schema):
    """Cost of one method: all phases that are still to run."""

    method: Literal["lightning", "live", "sft"]
    flops: float
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    memory_basis: str
    disk_basis: str
    phases: list[PhaseEstimate]


WayToTrain = Literal["full", "lora", "lora_4bit"]


class FitOption(Schema):
    """One way to train, and whether it fits the device: with the largest micro-batches that do, else the smallest."""

    name: WayToTrain
    fits: bool
    peak_memory_bytes: int
    checkpointing: CheckpointingPolicy
    micro_batch_tokens: int
    overrides: dict[str, Any] = Field(default_factory=dict, description="what the plan's overrides must add for it")


class Finding(Schema):
    """Something that blocks a plan, or that the user should know, with the way out."""

    code: str
    message: str
    fix: str
    call: NextAction | None = None
    overrides: dict[str, Any] | None = Field(None, description="recipe keys that lift it")

    @classmethod
    def of_error(cls, error: OpdError) -> Self:
        """An error as a finding."""
        return cls(code=error.code, message=error.message, fix=error.fix, call=error.call)


class ConsistencyVerdict(Schema):
    """Whether the SFT teacher and the cache's teacher are the same, and how that is known."""

    status: Literal["consistent", "mismatch", "unknown"]
    basis: Literal["proven", "asserted", "by_construction"] | None = None
    teacher: ModelIdentity | None = None
    sft_teacher: TeacherClaim | None = None
    mismatch_allowed: bool = False
    teacher_delta: TeacherDelta | None = None
    engine_gap: EngineGap | None = None
    measured_in: str | None = Field(
        None,
        description="the cache they and `rollouts` come from: the plan's own, else the newest of these models",
    )
    not_measured: str | None = Field(None, description="why teacher_delta or engine_gap is absent")


class PromptPreview(Schema):
    """One prompt as the model is given it."""

    id: str
    text: str = Field(description="decoded from its ids, control tokens included; a long one without its middle")
    tokens: int
    control_tokens: dict[str, int] = Field(default_factory=dict, description="those among its ids, with how often")
    teacher_text: str | None = Field(None, description="what the teacher sees, where that is something else")


class LearntPreview(Schema):
    """One row of SFT: `learnt` follows `prompt`, and the loss counts its tokens alone."""

    source: Literal["responses", "made up"] = Field(description="a row of the responses, or a made-up answer")
    prompt: str
    learnt: str
    prompt_tokens: int
    learnt_tokens: int


class LimitShare(Schema):
    """How many of the measured prompts are over one limit."""

    limit: str = Field(description="the recipe's key, or what a model's positions must hold")
    tokens: int
    over: int


class Preview(Schema):
    """What the run makes of the data before it starts, made by the code that the run uses.

    A plan has none while the models are still to be fetched.
    """

    tokenizer: Literal["teacher", "student"]
    prompts: list[PromptPreview] = Field(default_factory=list)
    measured: int = Field(0, description="prompts that were encoded for the counts here")
    of: int = Field(0, description="prompts there are; all of them were measured where the two are the same")
    stops: dict[str, str] = Field(default_factory=dict, description="text of each id that ends a response")
    end_of_turn: int | None = Field(None, description="the stop that SFT teaches")
    learnt: LearntPreview | None = None
    limits: list[LimitShare] = Field(default_factory=list)
    template: dict[str, str] = Field(
        default_factory=dict, description="what the chat template does with thinking, system prompts and several turns"
    )
    control_tokens: Literal["text", "tokens"] = "text"
    prompts_spelling_control_tokens: int = 0
    spelt_control_tokens: dict[str, int] = Field(default_factory=dict)


class GradingPlan(Schema):
    """How answers will be graded, and how many expected answers are right when a response says just them."""

    grader: GraderName
    why: str
    right: int
    graded: int


class MethodOverhead(Schema):
    """What a method takes beyond the SFT that both share, by measured speeds."""

    method: Literal["lightning", "live"]
    seconds: float
    device_hours: float = Field(description="of one device, held for all of it")
    teacher_seconds: float = Field(description="of them with the teacher in memory")
    devices: int = 1
    peak_memory_bytes: int


class Overhead(Schema):
    """The answer of an assessment: live against lightning for the asked recipe, each figure with its basis."""

    methods: list[MethodOverhead]
    break_even_steps: int | None = Field(None, description="from so many steps on lightning is cheaper; absent: never")
    students_per_cache: int | None = Field(
        None, description="students that must share the cache before lightning is cheaper at the recipe's steps"
    )
    start_seconds: dict[str, float] = Field(description="of loading each model")
    measured_peak_bytes: int
    basis: dict[str, str]
    assessment: Assessment


class PlannedArm(Schema):
    """One arm of a comparison: the distillation as asked, or a baseline."""

    name: str = Field(description="'asked', or the baseline's")
    runs: int = Field(description="one per seed")
    seconds: float | None = Field(None, description="of one of its runs by itself, what is not made yet")


class Plan(Schema):
    """The answer of `plan_distillation`; `plan_id` is the approval and the idempotency key."""

    plan_id: str
    method: Literal["lightning", "live", "sft"]
    inputs: RunInputs
    recipe: Recipe
    phases: list[PlannedPhase]
    consistency: ConsistencyVerdict
    estimates: list[MethodEstimate] = Field(description="lightning and live side by side")
    fits: list[FitOption] = Field(default_factory=list, description="ways to train on this device")
    sample: list[str] = Field(default_factory=list, description="the first prompts, shortened")
    preview: Preview | None = None
    grading: GradingPlan | None = None
    hygiene: PromptHygiene = PromptHygiene()
    rollouts: RolloutStatistics | None = None
    blocking: list[Finding] = Field(default_factory=list)
    warnings: list[Finding] = Field(default_factory=list)
    preset_reason: str | None = Field(None, description="why this preset, where none was named")
    arms: list[PlannedArm] = Field(default_factory=list, description="where baselines or seeds were asked for")
    next_action: NextAction
