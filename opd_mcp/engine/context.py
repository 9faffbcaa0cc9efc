"""What a stage is given besides its section of the recipe: its inputs, and the context that all stages share.

Imports no torch: a worker makes these before it loads the engine.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from opd_mcp.identity.signatures import MadeHere, everywhere
from opd_mcp.schemas.errors import ResourceError, RunError
from opd_mcp.schemas.identity import BaseForm, RemoteTeacher, TeacherClaim
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.recipes import BenchmarkRecipe, CheckpointRecipe, PromptingRecipe, RolloutRecipe, RuntimeRecipe
from opd_mcp.schemas.reports import Curve, GradedResponses, StageCost
from opd_mcp.schemas.runs import Alert, DataOrigin, ModelOrigin


class Reporter(Protocol):
    """Where a stage reports its progress; a stage knows nothing of runs, databases or MCP."""

    def phase(self, name: str) -> None:
        """A part of the stage begins."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` units are finished."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Named values at a training step."""

    def alert(self, code: str, message: str) -> None:
        """Something the user should know while the stage runs."""

    def resumed(self, step: int) -> None:
        """Training continues after this step of an earlier attempt; what was reported of later steps is void."""

    def position(self) -> int:
        """Make everything reported so far durable; the position up to which it is."""

    def should_stop(self) -> bool:
        """Whether the stage should stop; it then raises RunError `run_cancelled` at its next step."""


class SilentReporter(Reporter):
    """A reporter for library use and tests: it reports nothing and never stops."""

    def position(self) -> int:
        """Nothing was kept."""
        return 0

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class QuietReporter(Reporter):
    """Passes on alerts and the request to stop, and nothing else: for work within the step or phase of another one."""

    told: Reporter

    def phase(self, name: str) -> None:
        """Not told."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Not told."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Not told."""

    def resumed(self, step: int) -> None:
        """Not told."""

    def alert(self, code: str, message: str) -> None:
        """Told."""
        self.told.alert(code, message)

    def position(self) -> int:
        """That of the run."""
        return self.told.position()

    def should_stop(self) -> bool:
        """As the run says."""
        return self.told.should_stop()


@dataclass(frozen=True)
class EngineWish:
    """An engine that a stage needs: which one, serving which directory, in which dtype, for sequences of `length`.

    `topk` are the top tokens that it must be able to tell of each position. `beside_training`: the model is trained on
    the same device meanwhile. `fresh`: on an engine that was started for it, not given the weights in place.
    """

    kind: str
    model: Path
    dtype: Literal["float32", "bfloat16"]
    length: int
    topk: int = 0
    beside_training: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine answers, and the name that it has for what it serves; None: the directory's.

    `check` raises once it can no longer be kept running. `reload` gives it the weights of another directory in place;
    False where it does not take them.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    dtype: str | None = None
    managed: bool = False
    check: Callable[[], None] = lambda: None
    name: str | None = None
    reload: Callable[[Path], bool] = lambda path: False


def no_engine(wish: EngineWish) -> AbstractContextManager[list[EngineAddress]]:
    """Raises ResourceError `engine_failed`: only a worker starts engines."""
    raise ResourceError(
        "engine_failed",
        f"Nothing here can start {wish.kind}: a worker does that.",
        value=wish.kind,
        fix="Give the URL of a server that runs as the engine, or 'local'.",
    )


@dataclass(frozen=True)
class RankPlace:
    """The place of this process among the `size` ranks that train one model together.

    They are on `nodes` machines, equally many on each and those of one after the other's; 1 where that is not so. They
    meet in `folder`, which is theirs alone. A collective operation that one of them does not join within
    `timeout` seconds fails on the others.
    """

    rank: int
    size: int
    folder: Path
    timeout: float = 600.0
    nodes: int = 1


class Helpers(Protocol):
    """Other processes of this machine, each with a device of its own, that compute parts of a stage's work.

    Jobs are folders in `folder` (`engine/parts.py`). `patience` are the seconds for which a part is waited for that
    should have been there.
    """

    @property
    def folder(self) -> Path:
        """Where jobs are."""

    @property
    def patience(self) -> float:
        """Seconds."""

    @property
    def count(self) -> int:
        """How many there are."""

    def share(self, job: Path) -> None:
        """Have them compute parts of the job in this folder, until all are there."""

    def check(self) -> None:
        """Say in an alert which of them has ended."""

    def give_up(self) -> None:
        """End all of them: somebody does not come to an end."""


@dataclass(frozen=True)
class Context:
    """Shared by all stages of a run."""

    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    prompting: PromptingRecipe = field(default_factory=PromptingRecipe)
    reporter: Reporter = field(default_factory=SilentReporter)
    teacher_key: str | None = field(default=None, repr=False)
    """The bearer token of a remote teacher; it is written to no file."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    checkpoints: Path | None = None
    """Where a training stage keeps its checkpoints and finds those of an earlier attempt; None: nowhere."""
    made_here: MadeHere = everywhere
    """Whether a directory's lineage proves its claims. A workspace asks its key. Who calls the stages as a library, and
    says nothing, vouches for every directory that it names."""
    rendered_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """The moment that chat templates write which ask for the time: one for all stages and attempts of a run."""
    check_fence: Callable[[], None] = lambda: None
    """Raises once another worker owns the run: called right before a write that others see, from any thread."""
    start_engine: Callable[[EngineWish], AbstractContextManager[list[EngineAddress]]] = no_engine
    """Starts an engine for a block's time, on several devices one each; the worker, which keeps a run's processes,
    gives it."""
    convert_to_gguf: Callable[[Path, Path], None] | None = None
    """Writes a GGUF file, the second path, of the model in a directory; None where llama.cpp's converter is unknown."""
    ranks: RankPlace | None = None
    """Among which processes a training stage trains one model; None: this one alone."""
    helpers: Helpers | None = None
    """Who computes parts of a generation or a scoring besides this process; None: nobody."""

    @property
    def writes(self) -> bool:
        """Whether this process writes the stage's results; of several ranks the first one does."""
        return self.ranks is None or self.ranks.rank == 0


def require_going(context: Context) -> None:
    """Raise RunError `run_cancelled` if the user asked to stop."""
    if context.reporter.should_stop():
        raise run_cancelled()


def run_cancelled() -> RunError:
    """The error of a stage that was asked to stop."""
    return RunError(
        "run_cancelled", "The run was asked to stop.", fix="Resume the run to go on from there.", call=resume_call()
    )


def counter(context: Context, total: int, unit: str, before: int = 0) -> Callable[[int], None]:
    """A listener for the end of a batch: reports `before` + done of `total`; raises RunError `run_cancelled`."""

    def on_batch(done: int) -> None:
        context.reporter.progress(before + done, total, unit)
        require_going(context)

    return on_batch


@dataclass(frozen=True, kw_only=True)
class ResponsesInputs:
    """Of `stages.generate_responses`: the teacher's directory and the SFT prompts.

    `grading` says how to grade the responses; it is for runs that end with them, since `stages.sft` grades as well, and
    for those that keep the right ones only. Of several `teachers` by domain each answers the prompts of its own;
    `teacher` is the one whose tokenizer counts.
    """

    teacher: Path
    prompts: Path
    teachers: Mapping[str, Path] = field(default_factory=dict)
    grading: BenchmarkRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class SftInputs:
    """Of `stages.sft`: `sft_teacher` counts for responses without lineage, `tokenizer` before the saved one.

    `grading` says how responses are graded whose prompts have answers; None: they are not.
    """

    student: Path
    responses: Path
    sft_teacher: TeacherClaim | None = None
    tokenizer: Path | None = None
    grading: BenchmarkRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutInputs:
    """Of `stages.rollout`: `tokenizer` is the teacher's directory, whose template and EOS ids hold.

    `longest` are the tokens of the longest sequence that the scorer of the rollouts takes. `form` is how the training
    that will learn from them holds the student's linear layers. At most `most` are drawn, from the prompt after the
    first `skipped` on: of several rounds each has prompts of its own.
    """

    student: Path
    prompts: Path
    tokenizer: Path | None = None
    eval_prompts: Path | None = None
    form: BaseForm = "as_saved"
    longest: int | None = None
    most: int | None = None
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """Of `stages.check_teacher`: who is to score which student; the teacher is a directory, a server, or both.

    `sft_teacher` counts for a student without lineage; `sft_teacher_path` is the directory that Δ is measured with;
    `form` is that of the rollouts, `prompts` those whose messages for the teacher belong to its identity.
    Of several `teachers` by domain each scores the rows of its own; `teacher` is the one whose tokenizer counts.
    """

    student: Path
    prompts: Path | None = None
    teacher: Path | None = None
    teachers: Mapping[str, Path] = field(default_factory=dict)
    remote: RemoteTeacher | None = None
    sft_teacher: TeacherClaim | None = None
    sft_teacher_path: Path | None = None
    allow_teacher_mismatch: bool = False
    form: BaseForm = "as_saved"


@dataclass(frozen=True, kw_only=True)
class ScoreInputs(TeacherInputs):
    """Of `stages.score`: the directory that `stages.rollout` filled, and who is to score it."""

    rollouts: Path


@dataclass(frozen=True, kw_only=True)
class RoundInputs:
    """One of several stretches of a distillation, from step `first` (of all rounds' steps) to `last` at most.

    `until_stale` ends it once its rollouts are stale. `before` is the directory of the round before, whose optimizer
    goes on; `origin` that of the student that round 1 began with. The `final` one saves the student as the recipe says.
    """

    number: int
    first: int
    last: int
    final: bool
    origin: Path
    before: Path | None = None
    until_stale: bool = False


@dataclass(frozen=True, kw_only=True)
class DistillInputs:
    """Of `stages.distill`: `cache` for the method lightning; `teacher`, `prompts` and `rollout` for live.

    `round` is for a lightning distillation in several stretches. With `distill.evaluate_steps` the student is judged
    on `held_out` prompts, graded by `grading`, and against the `judge`, a teacher's directory, where there is one, or
    several `judges` by domain.
    """

    student: Path
    cache: Path | None = None
    teacher: Path | None = None
    prompts: Path | None = None
    rollout: RolloutRecipe | None = None
    sft_teacher: TeacherClaim | None = None
    allow_teacher_mismatch: bool = False
    round: RoundInputs | None = None
    held_out: Path | None = None
    grading: BenchmarkRecipe | None = None
    judge: Path | None = None
    judges: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkInputs:
    """Of `stages.benchmark`: models by name, the candidate first; what earlier stages took, alerted and graded.

    `references` are measured besides where the prompts have answers; `not_measured` says of others why they are not.
    `suite` names what the prompts are, `suite_changes` what differs from how it is published, as [published, used].
    `planned_seconds` by stage and `curves` are for the report's figures, `run` is its heading; `forms` says of models
    by name how the run's training held their linear layers. The first `skipped` prompts were used to choose the
    candidate. Of several `teachers` by domain the reverse KL asks each for the rows of its own.
    """

    models: Mapping[str, Path]
    prompts: Path
    recipe_hash: str
    teacher: Path | None = None
    teachers: Mapping[str, Path] = field(default_factory=dict)
    references: Mapping[str, Path] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    teacher_responses: GradedResponses | None = None
    suite: str | None = None
    forms: Mapping[str, BaseForm] = field(default_factory=dict)
    suite_changes: Mapping[str, list[Any]] = field(default_factory=dict)
    costs: Sequence[StageCost] = ()
    alerts: Sequence[Alert] = ()
    planned_seconds: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    run: str | None = None
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Of `stages.benchmark_task`: models by name, a task of lm-eval by name, and where its data is kept.

    `tasks` is a folder of further task files, instead of lm-eval's own; they are programs, so no tool gives one.
    """

    models: Mapping[str, Path]
    task: str
    data: Path
    recipe_hash: str
    tasks: Path | None = None


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """Of `stages.sample`: a model's directory and the prompts it answers."""

    model: Path
    prompts: Path


@dataclass(frozen=True, kw_only=True)
class AssessInputs:
    """Of `stages.assess`: the directories of two models, and prompts."""

    student: Path
    teacher: Path
    prompts: Path


@dataclass(frozen=True, kw_only=True)
class ExportInputs:
    """Of `stages.export`: a model's directory, its newest report, and what it was made of, for its card."""

    model: Path
    report: Path | None = None
    models: Sequence[ModelOrigin] = ()
    data: Sequence[DataOrigin] = ()
