"""Recipes: every setting of every stage, resolved, as data."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from opd_mcp.schemas.base import AddedLater, Schema
from opd_mcp.schemas.identity import BaseForm, Quantization

Method = Literal["lightning", "live", "sft"]
Estimator = Literal["sampled", "topk_reverse_kl", "topk_forward_kl", "topk_js", "topk_entropy_mixed", "opsa"]
TokenWeighting = Literal["uniform", "early"]
Normalize = Literal["sample", "token"]
CacheDtype = Literal["float32", "float16"]
OnTruncated = Literal["keep", "drop", "cap"]
TrainTurns = Literal["all", "last"]
SaveDtype = Literal["input", "float32", "bfloat16"]
ExportFormat = Literal["input", "float32", "bfloat16", "adapter", "gguf"]
Preset = Literal["quick", "paper", "demo"]
AskedPreset = Literal["auto", "quick", "paper", "demo"]
Precision = Literal["fp32_master", "fp32_master_8bit", "split_master", "bf16_stochastic", "bf16"]
ActivationCheckpointing = Literal["auto", "none", "selective", "full"]
AdapterInit = Literal["kaiming", "gaussian"]
AdapterScaling = Literal["lora", "rslora"]
AdapterSave = Literal["adapter", "merged", "both"]
GraderName = Literal["math", "number", "choice", "exact", "gsm8k", "boxed", "regex", "code", "reasoning_gym"]
ReferenceRow = Literal["teacher", "base"]
VocabularySharing = Literal["auto", "gathered", "divided"]
Replicas = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
Devices = Annotated[int, Field(ge=1, le=1024)] | Literal["all"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
BATCH = (
    "rows drawn at a time; halved by the plan, unless an override names it, until the device's memory holds it. "
    "Sampled tokens depend on it: each batch, or four that share their places on CUDA, has a random stream of its own"
)
MANAGED_ENGINES = ("vllm", "sglang")
SGLANG_KEEPS = 6  # tokens of its context that no prompt may reach (sglang/srt/managers/utils.py)
MAX_ROUNDS = 32


def _engine(value: object) -> object:
    """None for the engine of this program: absent, it leaves a phase's key as it was before there were others."""
    if value in (None, "local"):
        return None
    if isinstance(value, str) and value in (*MANAGED_ENGINES, "auto"):
        return value
    given = value.split(",") if isinstance(value, str) else value
    if isinstance(given, (list, tuple)) and all(isinstance(url, str) for url in given):
        urls = [url.strip() for url in given]
        if urls and all(url.startswith(("http://", "https://")) for url in urls) and len(set(urls)) == len(urls):
            return ",".join(urls)
    raise ValueError("an engine is 'local', 'vllm', 'sglang', 'auto', or the URL of a server, or several, each once")


# `local`, a managed engine's name, `auto` until a plan has chosen, or the URLs of servers, with commas between them
Engine = Annotated[str | None, BeforeValidator(_engine)]
ENGINE = "'local' (default), 'vllm', 'sglang', 'auto', or the URL of a server, or several (docs/engines.md)"


def is_url(engine: str | None) -> bool:
    """Whether an engine is a server that the user runs, or several."""
    return engine is not None and "://" in engine


def urls_of(engine: str) -> list[str]:
    """The addresses of the servers that an engine is."""
    return engine.split(",")


class RuntimeRecipe(Schema):
    """Where and how a run computes; `seed` is the only source of randomness in every stage."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto': a free GPU, else the CPU")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the computation; weights are kept as optimizer.precision says",
    )
    threads: PositiveInt = Field(1, description="of a run on the CPU: a core each")
    seed: Seed = Field(0, description="of every draw in every stage")
    devices: Annotated[Devices, AddedLater()] = Field(
        1,
        description="how many devices of one kind a run computes on, or 'all' of this machine: in sft and lightning "
        "each holds its part of the student; responses, rollouts, scores and benchmark are shared (docs/scale.md)",
    )
    vocabulary: Annotated[VocabularySharing, AddedLater()] = Field(
        "auto",
        description="of a student that several devices train: 'gathered' on each for a step, or 'divided' in the step "
        "too, which takes less memory and moves the tokens; 'auto': divided only where gathering it does not fit",
    )
    replicas: Annotated[Replicas, AddedLater()] = Field(
        "auto",
        description="groups of a training's devices that each hold the whole student (hybrid sharding); 'auto': one, "
        "or on several nodes one per node where the student fits there",
    )


class PromptingRecipe(Schema):
    """How a prompt becomes token ids, and which ids end a response."""

    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="options of the chat template, e.g. {'enable_thinking': false}"
    )
    eos_token_ids: list[int] | None = Field(
        None, description="default: the teacher's, of its generation config, its tokenizer and its chat template"
    )
    max_prompt_tokens: PositiveInt = Field(2048, description="longer prompts are left out, and counted")
    teacher_system: Annotated[str, Field(min_length=1, max_length=20_000)] | None = Field(
        None, description="a system prompt that the teacher alone sees, answering and scoring (docs/method.md)"
    )
    differing_tokens: Literal["refuse", "learn"] = Field(
        "refuse",
        description="special tokens that teacher and student name differently where prompts have them: refused, or "
        "learnt by the student in its SFT",
    )
    control_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="what a control token such as <|im_end|> becomes where a prompt's text spells it: ordinary text, "
        "or the token itself",
    )


class Sampling(Schema):
    """How tokens are drawn; log-probs are always stored untruncated at temperature 1, regardless of these settings."""

    temperature: Annotated[float, Field(ge=0, le=10)] = Field(1.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1: every token")
    max_new_tokens: PositiveInt = Field(1024, description="a response is cut there")


class OptimizerRecipe(Schema):
    """AdamW with warm-up and a schedule."""

    learning_rate: PositiveFloat = Field(2e-6, description="at its highest")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="after the warm-up: constant, or to zero by the last step",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="in which the rate rises from zero")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's β1 and β2")
    eps: PositiveFloat = Field(1e-8, description="AdamW's ε")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled, on matrices only")
    gradient_clip: PositiveFloat = Field(1.0, description="largest norm of a step's gradient")
    precision: Precision = Field(
        "fp32_master",
        description="what the weights are kept in: float32, with float32 or 8-bit moments (extra 'int8'); bf16 with a "
        "16-bit low part that makes them exact float32; or bf16 alone, rounded stochastically or to the nearest",
    )


class AdapterRecipe(Schema):
    """LoRA (arXiv 2106.09685): the student stays frozen, and two thin matrices per linear layer are trained."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(32, description="r")
    alpha: PositiveFloat | None = Field(None, description="default: twice the rank")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="names of linear layers, e.g. ['q_proj', 'v_proj']; default: all of a decoder layer"
    )
    init: AdapterInit = Field("kaiming", description="how A is drawn; B starts at zero")
    scaling: AdapterScaling = Field("lora", description="α/r, or 'rslora': α/√r (arXiv 2312.03732)")
    base_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights; 'auto': the runtime's, or float32 where they are stored in float32"
    )
    quantization: Quantization | None = Field(
        None,
        description="'nf4': the frozen linear layers are held in 4 bits (arXiv 2305.14314), 4.5 with their scales; the "
        "student and its rollouts are those of the dequantised weights",
    )
    continue_adapter: bool = Field(
        False, description="go on training the adapter that the student is; otherwise a new one starts at zero on it"
    )
    save: AdapterSave | None = Field(
        None,
        description="peft's format, a whole model, or both; default: 'merged' in a float32 run, 'adapter' in a "
        "bfloat16 run, where loading a merged student would round its delta away, and with a quantization",
    )

    @property
    def scale(self) -> float:
        """The factor of the product BA."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def saved_as(self, dtype: Literal["float32", "bfloat16"]) -> AdapterSave:
        """How a run in this dtype saves its student."""
        return self.save or ("merged" if dtype == "float32" and self.quantization is None else "adapter")


def base_form(adapter: AdapterRecipe | None) -> BaseForm:
    """How a training, and the rollouts that it learns from, hold the student's linear layers."""
    return (adapter.quantization if adapter else None) or "as_saved"


class ResponsesRecipe(Schema):
    """Stage 1a: the teacher answers the SFT prompts."""

    sampling: Sampling = Sampling()
    limit: PositiveInt | None = Field(None, description="use only the first so many prompts")
    samples: Annotated[int, Field(ge=1, le=64), AddedLater()] = Field(1, description="responses per prompt")
    keep: Annotated[Literal["all", "right"], AddedLater()] = Field(
        "all",
        description="'right': only those that the benchmark's grader finds right, without copies; prompts need answers",
    )
    batch_size: PositiveInt = Field(64, description=BATCH)
    engine: Engine = Field(None, description=f"what generates: {ENGINE}")


class SftRecipe(Schema):
    """Stage 1b: maximum likelihood on the teacher's response tokens."""

    skip: Annotated[bool, AddedLater()] = Field(
        False, description="no SFT, for a student that is its teacher, which sees more (docs/method.md)"
    )
    steps: PositiveInt = Field(250, description="of the optimizer")
    batch_size: PositiveInt = Field(32, description="responses per step")
    max_length: PositiveInt = Field(
        4096,
        description="tokens of a prompt with its response; longer ones are left out, and counted",
    )
    train_turns: TrainTurns = Field(
        "all", description="of a chat: learn every turn of the assistant, or only the last; the rest is context"
    )
    on_truncated: Literal["drop", "keep"] = Field(
        "drop", description="responses that the length limit cut: left out, or learnt without an end"
    )
    optimizer: OptimizerRecipe = OptimizerRecipe(learning_rate=8e-5, schedule="cosine", warmup_steps=25)
    micro_batch_tokens: PositiveInt = Field(16384, description="padded tokens in one forward pass")
    activation_checkpointing: ActivationCheckpointing = Field(
        "auto", description="what the backward computes again; 'auto' takes the least that fits the memory"
    )
    save_dtype: SaveDtype = Field(
        "input",
        description="what the student's weights are saved in; 'input': as the student was given, or as "
        "`precision` kept them where that is narrower; an adapter is merged in float32",
    )
    adapter: AdapterRecipe | None = Field(
        None,
        description="train an adapter only: {} for rank 32 on all linear layers, or its keys; default: all weights",
    )


class RolloutRecipe(Schema):
    """Stage 2a: the student's own responses; `count` cycles through the prompts."""

    sampling: Sampling = Sampling(temperature=0.8, max_new_tokens=4096)
    count: PositiveInt | None = Field(None, description="default: one response a prompt")
    batch_size: PositiveInt = Field(256, description=BATCH)
    shard_rows: PositiveInt = Field(
        4096,
        description="rollouts per file of the cache: what a resumed build draws again at most",
    )
    engine: Engine = Field(None, description=f"what generates: {ENGINE}")
    rescore: Literal["local"] | None = Field(
        None,
        description="'local': store the log-probs of this program's own scorer instead of the generator's, for a "
        "generator that rounds (bf16)",
    )
    reload_steps: Annotated[PositiveInt, AddedLater()] = Field(
        50, description="'live' with an engine: steps after which it is given the student's weights anew"
    )


class ScoreRecipe(Schema):
    """Stage 2a: the teacher's log-probs of every sampled token, and optionally of its own top k."""

    topk: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="how many of the teacher's likeliest tokens are stored next to the sampled one",
    )
    dtype: CacheDtype = Field("float32", description="of the stored log-probs")
    on_truncated: OnTruncated = Field("keep", description="rollouts without an end: as they are, left out, or cut")
    cap_tokens: PositiveInt | None = Field(
        None, description="tokens that 'cap' leaves of a truncated rollout; default: half of it"
    )
    micro_batch_tokens: PositiveInt = Field(16384, description="padded tokens in one forward pass")
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="requests at a time to a remote teacher; at least, to an engine"
    )
    engine: Engine = Field(None, description=f"what computes the teacher's log-probs: {ENGINE}")


class DistillRecipe(Schema):
    """Stage 2b: train the student towards the teacher on its own rollouts."""

    method: Literal["lightning", "live"] = Field(
        "lightning",
        description="'lightning': from a teacher cache; 'live': fresh rollouts and teacher at every step",
    )
    estimator: Estimator = Field("sampled", description="what is minimised (docs/method.md)")
    topk: PositiveInt = Field(8, description="k of the top-k estimators")
    repair: Annotated[Literal["none", "residual"], AddedLater()] = Field(
        "none", description="'residual' takes a mismatched teacher's style off its cached scores (docs/method.md)"
    )
    js_beta: Annotated[float, Field(gt=0, lt=1), AddedLater()] = Field(
        0.5, description="β of topk_js: near 0 towards the forward KL, near 1 towards the reverse KL"
    )
    extrapolation: Annotated[float, Field(gt=0, le=4), AddedLater()] = Field(
        1.0,
        description="λ: trains on log π_ref + λ (log π_T − log π_ref); above 1 beyond the teacher, below 1 near π_ref",
    )
    horizon: PositiveFloat | None = Field(
        None, description="train on the beginning of each response only: so many tokens, or below 1 such a share"
    )
    horizon_growth_steps: PositiveInt | None = Field(
        None, description="steps in which the horizon grows to whole responses; default: it stays"
    )
    token_weighting: Annotated[TokenWeighting, AddedLater()] = Field(
        "uniform", description="'early' weighs a token by what of its response's disagreement is still to come"
    )
    domain_weights: dict[str, Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]] | None = Field(
        None, description="how much a rollout of a teacher_domain counts; 1 for domains that are not named"
    )
    entropy_share: Annotated[float, Field(gt=0, le=1), AddedLater()] = Field(
        1.0, description="train only on this share of a step's tokens, those where the teacher is least sure"
    )
    normalize: Normalize = Field(
        "sample",
        description="a step's loss is the mean over its responses' means, or over all of its tokens",
    )
    advantage_clip: PositiveFloat = Field(10.0, description="τ; the paper's value is 10")
    steps: PositiveInt = Field(150, description="of the optimizer")
    batch_size: PositiveInt = Field(256, description="rollouts per step")
    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS), AddedLater()] = Field(
        1, description="stretches of training, each on new rollouts of the student as it is then, scored anew"
    )
    round_trigger: Annotated[Literal["steps", "stale"], AddedLater()] = Field(
        "steps", description="a round ends after its share of the steps, or once its rollouts are stale"
    )
    evaluate_steps: PositiveInt | None = Field(
        None, description="judge the student every so many steps on the first eval_prompts; the report leaves them out"
    )
    evaluate_prompts: Annotated[PositiveInt, AddedLater()] = Field(16, description="how many of them")
    keep: Annotated[Literal["last", "best"], AddedLater()] = Field(
        "last", description="which weights are saved: 'best' by evaluate_steps, the least reverse KL, else accuracy"
    )
    patience: PositiveInt | None = Field(
        None, description="end after so many evaluations without a better one; default: never"
    )
    optimizer: OptimizerRecipe = OptimizerRecipe()
    micro_batch_tokens: PositiveInt = Field(16384, description="padded tokens in one forward pass")
    activation_checkpointing: ActivationCheckpointing = Field("auto", description="as of sft")
    save_dtype: SaveDtype = Field("input", description="as of sft")
    adapter: AdapterRecipe | None = Field(None, description="as of sft")

    @property
    def teacher_tokens(self) -> int:
        """How many of the teacher's likeliest tokens the training reads."""
        return self.topk if self.estimator.startswith("topk_") or self.entropy_share < 1 else 0

    def steps_before(self, number: int) -> int:
        """Steps that the rounds before this one take, counted from 1; with `stale` that is the least."""
        return 0 if self.round_trigger == "stale" else self.steps * (number - 1) // self.rounds

    def rows_of_round(self, number: int) -> int | None:
        """The rollouts that a round's steps train on; None where a round may take all that a recipe draws."""
        if self.rounds == 1 or self.round_trigger == "stale":
            return None
        return self.batch_size * (self.steps_before(number + 1) - self.steps_before(number))

    @model_validator(mode="after")
    def _settings_fit_the_estimator(self) -> Self:
        for key, changed in (("repair", self.repair != "none"), ("extrapolation", self.extrapolation != 1)):
            if changed and self.estimator != "sampled":
                raise ValueError(
                    f"distill.{key} changes the scores of sampled tokens: it needs the estimator 'sampled', not "
                    f"'{self.estimator}'"
                )
        if self.extrapolation != 1 and self.method == "live":
            raise ValueError("distill.extrapolation needs π_ref's log-probs, which a teacher cache holds: not 'live'")
        if self.rounds > 1 and self.method == "live":
            raise ValueError(
                "distill.rounds are stretches between which rollouts are drawn; 'live' draws at every step"
            )
        if self.evaluate_steps is None and (self.keep == "best" or self.patience is not None):
            raise ValueError("distill.keep 'best' and distill.patience need distill.evaluate_steps to judge by")
        if self.rounds > 1 and (self.keep == "best" or self.patience is not None):
            raise ValueError("distill.keep 'best' and distill.patience are for one round: leave out distill.rounds")
        if self.keep == "best" and not self.optimizer.precision.startswith("fp32_master"):
            raise ValueError("distill.keep 'best' needs weights in float32: optimizer.precision 'fp32_master'")
        if self.rounds > self.steps:
            raise ValueError("distill.rounds are at most distill.steps")
        if self.horizon_growth_steps is not None and self.horizon is None:
            raise ValueError("distill.horizon_growth_steps needs a distill.horizon to grow from")
        if self.horizon is not None and self.horizon > 1 and not self.horizon.is_integer():
            raise ValueError("distill.horizon is a whole number of tokens, or a share below 1")
        return self


class BenchmarkRecipe(Schema):
    """The evidence: accuracy, reverse KL to the teacher, lengths."""

    samples_per_prompt: Annotated[int, Field(ge=0, le=64)] = Field(4, description="0: greedy accuracy only")
    sampling: Sampling = Sampling(temperature=0.6, top_p=0.95, max_new_tokens=4096)
    grader: GraderName | Literal["auto"] = Field(
        "auto",
        description="how an answer is found and compared; 'auto': 'regex' with an answer_pattern, else what fits the "
        "expected answers",
    )
    answer_pattern: str | None = Field(
        None,
        max_length=500,
        description="regular expression for the grader 'regex'; its first group, at its last match in the response, is "
        "the answer, compared exactly",
    )
    allow_code: bool = Field(
        False,
        description="whether the grader 'code' may run programs that a model wrote: without network, files read-only, "
        "under limits of time and memory",
    )
    prompt_template: str | None = Field(
        None,
        max_length=4000,
        pattern=r"(?s).*\{prompt\}",
        description="text around each prompt, which stands at {prompt}; default: the prompt alone",
    )
    references: tuple[ReferenceRow, ...] = Field(
        ("teacher", "base"),
        description="what a report measures besides, where the prompts have answers and the run has the model: the "
        "teacher, and the student before its SFT; leave out 'teacher' where it is costly",
    )
    least_teacher_accuracy: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3,
        description="an alert before training if surely fewer of the teacher's own responses are right",
    )
    limit: PositiveInt | None = Field(None, description="measure only the first so many prompts")
    kl_prompts: PositiveInt = Field(256, description="prompts whose fresh samples measure the reverse KL")
    batch_size: PositiveInt = Field(256, description=BATCH)
    engine: Engine = Field(None, description=f"what generates: {ENGINE}")

    @model_validator(mode="after")
    def _one_way_to_grade(self) -> Self:
        if self.grader == "regex" and self.answer_pattern is None:
            raise ValueError("the grader 'regex' needs benchmark.answer_pattern")
        if self.grader not in ("regex", "auto") and self.answer_pattern is not None:
            raise ValueError(
                f"benchmark.answer_pattern is for the grader 'regex', not '{self.grader}': set it to null, or leave "
                "benchmark.grader out"
            )
        if self.grader == "code" and not self.allow_code:
            raise ValueError("the grader 'code' runs programs that a model wrote: benchmark.allow_code must be true")
        return self


class CheckpointRecipe(Schema):
    """When checkpoints are written; this does not affect the result, so it is in no phase's key."""

    steps: PositiveInt | None = Field(None, description="every so many steps; default: by time")
    seconds: PositiveFloat = Field(60.0, description="by time: this often at most, and never over 4 % of training time")


class SampleRecipe(Schema):
    """A few responses to look at."""

    sampling: Sampling = Sampling(max_new_tokens=256)


class ExportRecipe(Schema):
    """How a model is exported: in the dtype of its files or in another one, merged, or its adapter alone."""

    format: ExportFormat = "input"
    shard_bytes: PositiveInt = Field(5_000_000_000, description="of one file of weights, at most")


class AssessRecipe(Schema):
    """A short measurement of two models: what their distillation would cost, and whether they fit each other."""

    rows: PositiveInt | None = Field(None, description="prompts; default: 32 on a CPU, a batch on a GPU")
    sft_steps: PositiveInt = Field(20, description="steps of the short SFT")
    steps: PositiveInt = Field(3, description="steps of distillation")


class Recipe(Schema):
    """The resolved recipe of a run, written next to its results."""

    preset: Preset = "quick"
    runtime: RuntimeRecipe = RuntimeRecipe()
    prompting: PromptingRecipe = PromptingRecipe()
    responses: ResponsesRecipe = ResponsesRecipe()
    sft: SftRecipe = SftRecipe()
    rollout: RolloutRecipe = RolloutRecipe()
    score: ScoreRecipe = ScoreRecipe()
    distill: DistillRecipe = DistillRecipe()
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    sample: SampleRecipe = SampleRecipe()
    assess: AssessRecipe = AssessRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
