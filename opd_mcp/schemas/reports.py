"""Reports: the final numbers, each with how it was obtained."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field

from opd_mcp.schemas.base import Record, Schema
from opd_mcp.schemas.identity import EngineFacts, ModelIdentity, Quantization
from opd_mcp.schemas.memory import CheckpointingPolicy
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.recipes import BenchmarkRecipe, GraderName, Precision
from opd_mcp.schemas.runs import Alert
from opd_mcp.schemas.texts import line_end

MetricValue = float | int
Judgement = Literal["better", "no_difference", "worse", "unknown"]


class Verdict(Schema):
    """The result of a run in one sentence, with its cause and the next step."""

    judgement: Judgement = Field(description="the candidate against its baseline; unknown where nothing compares them")
    sentence: str = Field(description="gain with its interval, share of the gap closed, cost")
    cause: str | None = Field(None, description="why it is not better, with the key to change, where that is known")
    causes: list[str] | None = Field(None, description="codes of the alerts that the cause tells, the deepest first")
    next_action: NextAction

    @property
    def is_bad(self) -> bool:
        """Whether it is shown in red: a loss, or no gain for a cause that was found."""
        return self.judgement == "worse" or (self.judgement != "better" and self.cause is not None)

    def text(self) -> str:
        """The judgement in front of the sentence, and the cause."""
        cause = f" Cause: {self.cause}" if self.cause else ""
        return f"{self.judgement.replace('_', ' ').upper()}: {self.sentence}{cause}"


class Curve(Schema):
    """A metric's finite points, thinned out."""

    key: str
    steps: list[int]
    values: list[float]


class Estimate95(Schema):
    """A measured value with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int
    basis: str = Field(description="how value and interval were obtained")


class StageCost(Schema):
    """Cost of one stage."""

    stage: str
    seconds: float
    tokens: int = 0
    steps: int = 0
    tokens_per_second: float | None = None
    device: str | None = None
    reused: bool = False
    round: int | None = Field(None, description="of several rounds, its number; absent in a sum over them")
    processor_seconds: float | None = Field(None, description="of the worker's process, all threads, its last attempt")


def summed_costs(costs: Iterable[StageCost]) -> list[StageCost]:
    """The costs with those of one stage's rounds added up, in the order in which stages first appear."""
    by_stage: dict[str, list[StageCost]] = {}
    for cost in costs:
        by_stage.setdefault(cost.stage, []).append(cost)
    return [rounds[0] if len(rounds) == 1 else _summed(rounds) for rounds in by_stage.values()]


def _summed(rounds: Sequence[StageCost]) -> StageCost:
    seconds, tokens = sum(cost.seconds for cost in rounds), sum(cost.tokens for cost in rounds)
    processor = [cost.processor_seconds for cost in rounds if cost.processor_seconds is not None]
    return rounds[-1].model_copy(
        update={
            "seconds": seconds,
            "tokens": tokens,
            "steps": sum(cost.steps for cost in rounds),
            "tokens_per_second": tokens / seconds if tokens and seconds > 0 else None,
            "reused": all(cost.reused for cost in rounds),
            "round": None,
            "processor_seconds": sum(processor) if len(processor) == len(rounds) else None,
        }
    )


class SftRows(Schema):
    """What became of the rows of an SFT data set; a chat gives one target per trained assistant turn."""

    rows: int
    targets: int = 0
    truncated: int = Field(0, description="responses that the length limit cut")
    too_long: int = Field(0, description="targets over sft.max_length tokens with their prompt")
    empty: int = Field(0, description="rows without a prompt, or without a response")
    refused: int = Field(0, description="chats that the template has no place for")
    cut: int = Field(0, description="targets that had text after the end of the turn, which is not learnt")


class TrainingSummary(Schema):
    """What a training stage did; step seconds exclude loading and saving."""

    steps: int
    seconds: float
    seconds_per_step: float
    trained_tokens: int
    parameters: int
    trained_parameters: int | None = Field(None, description="those of the adapter; absent where all are trained")
    device: str
    devices: int | None = Field(None, description="devices that held the model together; absent for one process")
    final: dict[str, MetricValue] = Field(default_factory=dict, description="means over the last tenth of steps")
    seconds_generation: float | None = None
    seconds_scoring: float | None = None
    replicas: int | None = Field(
        None, description="groups of those devices that each held the whole student; absent for one"
    )
    precision: Precision = Field("fp32_master", description="what the weights were kept in")
    activation_checkpointing: CheckpointingPolicy | None = Field(
        None, description="what the memory estimate or the recipe chose; absent where no step was left to take"
    )
    vocabulary: Literal["gathered", "divided"] | None = Field(
        None, description="how several devices shared embedding and head in a step; absent for one process"
    )
    packed: bool = Field(True, description="false: rows were padded in length buckets, since the class does not pack")
    throughput: "Throughput | None" = None
    sft_rows: SftRows | None = None
    teacher_responses: "GradedResponses | None" = None
    repair: "RepairSummary | None" = None
    held_out: "HeldOutSummary | None" = None
    round: "RoundSummary | None" = Field(None, description="absent for a training in one stretch")


class HeldOutEvaluation(Schema):
    """A student judged in its training, on fresh samples for a few held-out prompts."""

    step: int
    reverse_kl: float | None = Field(None, description="nats per token; absent where the teacher is not here")
    accuracy: float | None = Field(None, description="greedy; absent where the prompts have no answers")

    def rank(self) -> float:
        """Less is better: the reverse KL, without one the share of wrong answers."""
        return self.reverse_kl if self.reverse_kl is not None else -(self.accuracy or 0.0)


class HeldOutSummary(Schema):
    """How a distillation was judged on held-out prompts, and which step's weights were saved."""

    evaluations: list[HeldOutEvaluation]
    best_step: int
    kept_step: int
    last_step: int = Field(description="earlier than the recipe's steps where it was stopped")


class RoundSummary(Schema):
    """Which stretch of a distillation in rounds this was; steps are counted over all rounds."""

    number: int
    first_step: int = Field(description="steps that the rounds before took")
    last_step: int = Field(description="steps taken when it ended")
    ended_by: Literal["steps", "stale"]


class RepairSummary(Schema):
    """What distill.repair took off the teacher's scores, in nats per token of the cache."""

    tokens: int
    folds: int
    mean_difference: float = Field(description="teacher − behaviour log-prob, before the repair")
    mean_residual: float = Field(description="what was taken off the teacher's log-prob")
    explained_variance: float = Field(description="share of the difference's variance that the residual explains")

    def text(self, name: str) -> str:
        """One sentence about a model's training."""
        return (
            f"{name}: a residual of {self.mean_residual:+.3f} nats per token was taken off the teacher's scores "
            f"(distill.repair); it explains {self.explained_variance:.0%} of the variance of log π_T − log π_ref."
        )


class Throughput(Schema):
    """How fast a training stage was, and where its time went."""

    tokens_per_second: float = Field(description="response tokens per second of the loop")
    model_flops: float = Field(
        description="of all steps: 6 per parameter and token, 4 per frozen one, plus attention; no recomputation"
    )
    flops_per_second: float
    utilisation: float = Field(description="flops_per_second over matmul_peak")
    matmul_peak: float = Field(description="operations per second of a large matmul in this run's dtype, same process")
    peak_memory_bytes: int
    estimated_memory_bytes: int | None = Field(
        None, description="weights, gradients, optimizer, activations and logits as the plan counts them, for this data"
    )
    micro_batch_tokens: int = Field(description="the budget at the end: halved whenever memory ran out")
    seconds: dict[str, float] = Field(description="data, forward (with head), backward, optimizer, logging")


class GradedAnswers(Schema):
    """How many responses were graded, and in how many of them the grader found no answer."""

    responses: int
    without_answer: int
    empty: int = Field(0, description="responses without a visible character")
    timed_out: int = Field(0, description="responses whose grading went over its limits; they count as wrong")
    examples: list[str] = Field(default_factory=list, description="ends of up to three responses without an answer")

    def text(self, name: str, characters: int = 200) -> str:
        """One sentence about a model's answers, with the examples cut to so many characters."""
        text = f"{name}: {self.without_answer} of {self.responses} responses had no extractable answer"
        if self.timed_out:
            text += f", {self.timed_out} could not be graded within the limits and count as wrong"
        if self.examples:
            text += "; they end: " + ", ".join(f"`{line_end(example, characters)}`" for example in self.examples)
        if self.empty:
            text += f"; {self.empty} are empty"
        return text + "."


class GradedResponses(Schema):
    """How many of the teacher's own responses are right, where the SFT prompts have answers."""

    right: Estimate95
    grader: GraderName
    grader_reason: str
    answers: GradedAnswers
    truncated: int = Field(0, description="of the graded responses, those that the length limit cut")
    wrong: list[str] = Field(default_factory=list, description="up to three wrong ones: expected, read, the end")

    def text(self) -> str:
        """One sentence about them."""
        return (
            f"{round(self.right.value * self.right.samples)} of {self.right.samples} responses of the teacher are "
            f"right by `{self.grader}` ({self.grader_reason})"
        )


class TaskMetric(Schema):
    """A metric of a task of lm-eval; the interval is 1.96 of its standard errors, absent where it gives none."""

    value: float
    low: float | None = None
    high: float | None = None
    samples: int


class DomainScore(Schema):
    """A model's quality on the evaluation prompts of one `teacher_domain`."""

    greedy_accuracy: Estimate95 | None = None
    reverse_kl: Estimate95 | None = Field(None, description="to the teacher of this domain")


class ModelScore(Schema):
    """One model's quality on the evaluation prompts."""

    name: str
    identity: ModelIdentity
    greedy_accuracy: Estimate95 | None = None
    greedy_right: str | None = Field(
        None, description="a 1 for each right greedy answer, else a 0, in the order of the prompts with an answer"
    )
    sampled_accuracy: Estimate95 | None = Field(None, description="avg@n over the sampled responses")
    pass_at_k: dict[str, float] | None = Field(None, description="unbiased, by k")
    reverse_kl: Estimate95 | None = Field(
        None, description="exact KL(student‖teacher) per token on fresh student samples at T = 1, nats"
    )
    by_domain: dict[str, DomainScore] | None = Field(None, description="where prompts have a `teacher_domain`")
    answers: GradedAnswers | None = Field(None, description="over the greedy and the sampled responses")
    task_metrics: dict[str, TaskMetric] | None = Field(None, description="of a task of lm-eval")
    mean_response_tokens: float | None = Field(None, description="absent where nothing was generated")
    truncated_fraction: float | None = None
    eos_rate: float | None = None
    repeated_fraction: float | None = Field(None, description="responses that end in a repeated phrase")
    entropy: float | None = Field(None, description="nats per token of its own samples at T = 1")
    seconds: float
    tokens: int
    generated_by: EngineFacts | None = Field(None, description="absent: this program's own engine")


class Comparison(Schema):
    """Candidate compared with baseline on the same prompts; the difference is paired by prompt."""

    candidate: str
    baseline: str
    accuracy_difference: Estimate95


class GapClosed(Schema):
    """(candidate − baseline) / (teacher − baseline): the share of the way to the teacher's accuracy."""

    candidate: str
    baseline: str
    teacher: str
    share: Estimate95 | None = None
    not_measured: str | None = Field(None, description="why there is no share")


class QuantisationCost(Schema):
    """What holding the base's linear layers in 4 bits cost, measured on the student that the training began with.

    `quantised` and `plain` name its two rows among the models.
    """

    quantization: Quantization
    quantised: str
    plain: str
    reverse_kl: Estimate95 = Field(description="KL(quantised‖plain) per token on the evaluation prompts, nats")
    accuracy_difference: Estimate95 | None = Field(None, description="quantised − plain, greedy, paired by prompt")


class TokenRatios(Schema):
    """The tokens of a response, and how much more likely each is to the teacher than to the model that wrote it."""

    ends: list[int] = Field(description="per token, where it ends in the response's text, in characters")
    log_ratios: list[float] = Field(description="per token, log π_T − log π_θ at temperature 1, nats")


class ShownAnswers(Schema):
    """One prompt and what each model said, cut to size."""

    prompt: str
    answer: str | None = None
    responses: dict[str, str] = Field(description="by model")
    tokens: dict[str, TokenRatios] = Field(
        default_factory=dict, description="by model, of its response's first tokens; absent without a teacher"
    )
    right: dict[str, bool] = Field(default_factory=dict, description="by model; absent where nothing was graded")


class TrainedAdapter(Schema):
    """The adapter that a model's training made, as its lineage and its training's summary say."""

    stage: str
    rank: int
    scale: float = Field(description="the factor of the product BA")
    targets: list[str] | None = Field(None, description="absent: all linear layers of the decoder")
    trained_parameters: int | None = Field(None, description="absent where the model came without its summary")
    parameters: int | None = None
    start: Literal["zero", "continued"]
    saved: Literal["adapter", "merged", "both"]

    def text(self, name: str) -> str:
        """One sentence about it."""
        layers = ", ".join(self.targets) if self.targets else "all linear layers"
        share = ""
        if self.trained_parameters is not None and self.parameters:
            share = (
                f": {self.trained_parameters:,} of {self.parameters:,} parameters "
                f"({self.trained_parameters / self.parameters:.2%})"
            )
        begun = "from zero" if self.start == "zero" else "on from the student's own"
        kept = {"adapter": "as an adapter", "merged": "merged", "both": "merged and as an adapter"}[self.saved]
        return (
            f"{name}: a LoRA adapter of rank {self.rank} on {layers} was trained {begun} ({self.stage}){share}; saved "
            f"{kept}."
        )


class BenchmarkReport(Schema):
    """`report.json`: the evidence."""

    schema_version: Literal[1] = 1
    verdict: Verdict | None = Field(None, description="absent in reports of earlier versions")
    run: str | None = Field(None, description="name and id of the run that made it")
    recipe: BenchmarkRecipe
    suite: str | None = Field(None, description="the prompts' suite by name, or lm_eval:TASK")
    suite_changes: dict[str, list[Any]] = Field(
        default_factory=dict, description="settings that differ from the suite's: [published, used]"
    )
    seed: int
    prompts_sha256: str
    prompts: int
    prompts_with_answer: int
    grader: GraderName | None = None
    grader_reason: str | None = Field(None, description="why this grader: named, by its pattern, or by the answers")
    teacher: ModelIdentity | None = None
    teacher_row: str | None = Field(None, description="the name of the teacher among the models")
    models: list[ModelScore]
    comparisons: list[Comparison] = Field(default_factory=list)
    gap_closed: list[GapClosed] = Field(default_factory=list)
    quantisation: QuantisationCost | None = Field(None, description="absent where no student is in 4 bits")
    not_measured: dict[str, str] = Field(default_factory=dict, description="rows that are absent, and why")
    adapters: dict[str, TrainedAdapter] = Field(default_factory=dict, description="by model, where one was trained")
    repairs: dict[str, RepairSummary] = Field(
        default_factory=dict, description="by model, where it was trained on repaired scores"
    )
    teacher_responses: GradedResponses | None = Field(None, description="what the SFT of this run learnt from")
    hardware: str
    recipe_hash: str
    teacher_mismatch_allowed: bool = False
    teacher_basis: Literal["proven", "asserted"] | None = None
    costs: list[StageCost] = Field(default_factory=list)
    alerts: list[Alert] = Field(default_factory=list, description="of the run that made the report, the last 20")
    warnings: list[str] = Field(default_factory=list, description="what made this slower or less sure than it could be")
    planned_seconds: dict[str, float] = Field(default_factory=dict, description="what the plan expected, by stage")
    curves: list[Curve] = Field(default_factory=list, description="of the training that led here, phase.metric")
    samples: list[ShownAnswers] = Field(default_factory=list, description="the first prompts, each model's response")


class MeasuredSpeed(Schema):
    """One kind of work as an assessment measured it; the seconds are those of the work alone, without loading."""

    work: Literal["answer", "generate", "generate_live", "score", "sft", "distill"]
    rows: int = Field(description="drawn or scored; of a training, per step")
    steps: int = 0
    tokens: int = Field(description="response tokens")
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int = Field(description="until then: of the device's tensors, or on a CPU of the process")


class PairSide(Schema):
    """How the teacher sees a student's own rollouts."""

    teacher_logprob: float = Field(description="mean per token, nats")
    own_logprob: float = Field(description="the student's own of the same tokens")
    topk_overlap: float = Field(description="share of the teacher's top k that is in the student's top k")
    truncated: float = Field(description="share of rollouts that the length limit cut")
    accuracy: Estimate95 | None = Field(None, description="of the rollouts, where prompts have answers")


class Assessment(Schema):
    """`assessment.json`: what a short run measured of two models on this machine, before any money is spent."""

    hardware: str
    rows: int
    topk: int
    sft_steps: int
    load_seconds: dict[str, float] = Field(description="of the teacher and the student, weights to memory")
    speeds: list[MeasuredSpeed]
    before: PairSide = Field(description="the student as given")
    after: PairSide = Field(description="after a short SFT on the teacher's responses")
    teacher_truncated: float
    teacher_accuracy: Estimate95 | None = None
    judgement: Literal["works", "doubtful", "fails"]
    diagnosis: str = Field(description="whether this pair will work, in one sentence with its figures")

    def speed(self, work: str) -> MeasuredSpeed:
        """Of one kind of work."""
        return next(speed for speed in self.speeds if speed.work == work)


class LoopState(Schema):
    """The state of a training loop between two steps; times in seconds, over all attempts."""

    step: int = Field(0, description="steps taken; the next one is this step, counted from 0")
    micro_batch_tokens: int
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    seconds_generation: float = 0.0
    seconds_scoring: float = 0.0
    parts: dict[str, float] = Field(default_factory=dict, description="seconds by part of a step")
    recent: list[dict[str, float]] = Field(default_factory=list, description="metrics of the last steps")


class CheckpointRecord(Record):
    """`checkpoint.json`."""

    fingerprint: str = Field(description="hash of the settings and the parameters' shapes: whose checkpoint this is")
    state: LoopState
    journal_position: int = Field(description="the journal's records up to here were durable when this was written")
    threads: int
    torch: str
    device: str
    files: dict[str, str] = Field(description="sha256 of each file")
    replicas: int | None = Field(None, description="how many of the student the ranks held; absent for one")
