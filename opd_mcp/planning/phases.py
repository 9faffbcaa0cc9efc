"""The phases of a run and their keys.

A key is the content hash of everything that decides a phase's result: its recipe section, the runtime, the prompting
rules and its inputs. An input that an earlier phase makes counts as the artifact id that follows from that phase's
key, so keys are known before anything ran, and equal keys find each other's results.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opd_mcp.schemas.base import Schema, content_hash
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.identity import ArtifactKind, ModelIdentity
from opd_mcp.schemas.recipes import Method, Recipe, base_form
from opd_mcp.schemas.runs import DataInput, ModelInput, PhaseName, RunInputs, RunPhase, skipped_prompts


@dataclass(frozen=True)
class Published:
    """What kind of artifact a phase publishes, its role in a run's result, and how its id begins."""

    kind: ArtifactKind
    role: str
    prefix: str


PUBLISHED: dict[str, Published] = {
    "generate_responses": Published("responses", "responses", "responses"),
    "sft": Published("model", "sft", "model-sft"),
    "score": Published("cache", "cache", "cache"),
    "distill": Published("model", "model", "model-{method}"),
    "benchmark": Published("report", "report", "report"),
    "assess": Published("report", "assessment", "assessment"),
}
"""By phase; a phase that is not here makes something that only the next phase, or the run's result, holds."""
RANKED: frozenset[PhaseName] = frozenset({"sft", "distill"})
"""Phases that train one model on several devices together: another number of them gives another result."""
HELPED: frozenset[PhaseName] = frozenset({"generate_responses", "rollout", "score", "benchmark"})
"""Phases whose parts several devices compute: any number of them gives the same result."""
RESUMABLE: frozenset[PhaseName] = frozenset({"rollout", "score"})
"""Phases whose building directory outlives an interrupted run; its name is the phase and `KEY_DIGITS` of its key."""
KEY_DIGITS = 32
TOKENIZER_HASHES = ("tokenizer", "encoding", "chat_template", "special_tokens")
"""The hashes of an identity that decide how prompts become ids."""


@dataclass(frozen=True)
class Product:
    """The artifact that a phase publishes."""

    kind: ArtifactKind
    artifact_id: str


def product(name: PhaseName, key: str, method: str = "lightning") -> Product | None:
    """The artifact of a phase, by the phase's key; None for phases whose output is intermediate."""
    published = PUBLISHED.get(name)
    if published is None:
        return None
    return Product(published.kind, f"{published.prefix.format(method=method)}-{key[:12]}")


def model_token(model: ModelInput | None) -> Any:
    """What stands for a model in a key: its artifact id, else its identity without the name, else its Hub id."""
    if model is None:
        return None
    if model.url is not None:
        return {"remote": model.reference, "files": _identity_token(model.identity)}
    if model.artifact_id is not None:
        return model.artifact_id
    return _identity_token(model.identity) or {"hub": model.hub_id}


def data_token(data: DataInput | None) -> Any:
    """What stands for a data set in a key: its artifact id unless it is mere prompts, else its content's hash."""
    if data is None:
        return None
    if data.artifact_id is not None and not data.artifact_id.startswith("prompts-"):
        return data.artifact_id
    if data.sha256 is not None:
        return data.sha256
    return {"hub": data.hub_id, "columns": data.columns} if data.columns else {"hub": data.hub_id}


class PhaseChain:
    """Builds a run's phases one after the other, each keyed by what it reads."""

    def __init__(self, recipe: Recipe, inputs: RunInputs) -> None:
        self.recipe = recipe
        self.inputs = inputs
        self.phases: list[RunPhase] = []
        self.student: Any = model_token(inputs.student)
        self.responses: Any = data_token(inputs.responses)
        self.cache: Any = data_token(inputs.cache)
        self.distilled: Any = None
        sources: list[ModelInput | DataInput] = [*_models(inputs), *data_sets(inputs).values()]
        hub_ids = [source.hub_id for source in sources if source.hub_id and source.path is None]
        if hub_ids:
            self._add("fetch", {"hub_ids": hub_ids})

    def generate_responses(self) -> "PhaseChain":
        """The teacher answers the SFT prompts."""
        prompts = self.inputs.sft_prompts or self.inputs.prompts
        parts: dict[str, Any] = {"teacher": model_token(self.inputs.teacher), "prompts": data_token(prompts)}
        if self.recipe.responses.keep == "right":
            parts["grading"] = self.recipe.benchmark.model_dump(include={"grader", "answer_pattern"})
        key = self._add("generate_responses", parts, self.recipe.responses)
        self.responses = _product_id("generate_responses", key)
        return self

    def sft(self) -> "PhaseChain":
        """The student is fine-tuned on the responses; from here on it is the SFT student."""
        claim = _asserted(self.inputs.responses)
        parts = {"student": self.student, "responses": self.responses, "declared_teacher": claim}
        if self.inputs.responses is not None and self.inputs.teacher is not None:
            parts["tokenizer"] = _tokenizer_token(self.inputs.teacher)
        self.student = _product_id("sft", self._add("sft", parts, self.recipe.sft))
        return self

    def cache_of_rollouts(self, number: int | None = None) -> "PhaseChain":
        """The student's rollouts, scored by the teacher: the SFT student's, or of a later round the distilled one's."""
        teacher = self.inputs.teacher
        prompting = {"tokenizer": _tokenizer_token(teacher)}
        form = base_form(self.recipe.distill.adapter)  # π_ref is what the distillation begins with
        held = {} if form == "as_saved" else {"form": form}
        student = self._begins_with(number)
        drawn: dict[str, Any] = {}
        if number is not None and (number > 1 or self.recipe.distill.rows_of_round(number) is not None):
            drawn = {"round": number, "rows": self.recipe.distill.rows_of_round(number)}
            if number > 1:
                drawn["before"] = self.recipe.distill.steps_before(number)
        parts = {"student": student, "prompts": data_token(self.inputs.prompts), **prompting, **held, **drawn}
        rollouts = self._add("rollout", parts, self.recipe.rollout, number)
        scored = {"rollouts": rollouts, "teacher": model_token(teacher), **self._claims()}
        self.cache = _product_id("score", self._add("score", scored, self.recipe.score, number))
        return self

    def distill(self, number: int | None = None) -> "PhaseChain":
        """The student learns from the cache (lightning), or from its teacher at every step (live)."""
        parts = {"student": self._begins_with(number), **self._claims()}
        if self.recipe.distill.evaluate_steps is not None:
            parts["held_out"] = [data_token(self.inputs.eval_prompts), model_token(self.inputs.teacher)]
        if self.recipe.distill.method == "lightning":
            of_round = {} if number is None else {"round": number}
            key = self._add("distill", {**parts, "cache": self.cache, **of_round}, self.recipe.distill, number)
        else:
            live = {"teacher": model_token(self.inputs.teacher), "prompts": data_token(self.inputs.prompts)}
            rollout = self.recipe.rollout.model_copy(update={"count": None})
            key = self._add("distill", {**parts, **live, "rollout": rollout.key_settings()}, self.recipe.distill)
        self.distilled = _product_id("distill", key, self.recipe.distill.method)
        return self

    def benchmark(self) -> "PhaseChain":
        """The result is measured next to its origin."""
        inputs = self.inputs
        models = [model_token(inputs.model)] if inputs.model else [self.distilled, self.student]
        parts = {
            "models": [*models, *(model_token(baseline) for baseline in inputs.baselines)],
            "before": model_token(inputs.student),
            "teacher": model_token(inputs.teacher),
            "prompts": data_token(inputs.eval_prompts or inputs.prompts),
            "answers": inputs.eval_prompts is not None or inputs.model is not None,
            **({"suite": inputs.suite} if inputs.suite else {}),
            **({"skipped": skipped} if (skipped := skipped_prompts(self.recipe, inputs)) else {}),
        }
        self._add("benchmark", parts, self.recipe.benchmark)
        return self

    def sample(self) -> "PhaseChain":
        """A model answers a few prompts, to be looked at."""
        inputs = self.inputs
        self._add(
            "sample", {"model": model_token(inputs.model), "prompts": data_token(inputs.prompts)}, self.recipe.sample
        )
        return self

    def assess(self) -> "PhaseChain":
        """Two models are measured on a few prompts."""
        inputs, recipe = self.inputs, self.recipe
        measured = (recipe.responses, recipe.sft, recipe.rollout, recipe.score, recipe.distill)
        parts = {
            "student": self.student,
            "teacher": model_token(inputs.teacher),
            "prompts": data_token(inputs.prompts),
            "measured": [section.key_settings() for section in measured],
        }
        self._add("assess", parts, recipe.assess)
        return self

    def export(self) -> "PhaseChain":
        """A model is written outside of the workspace, with its card."""
        target = self.inputs.export
        assert target is not None, "an export has a destination"
        self._add("export", {"model": model_token(self.inputs.model), "target": target.to_dict()})
        return self

    def _claims(self) -> dict[str, Any]:
        # A proven claim follows from the student itself; only what the caller asserts is an input of its own.
        claim = _asserted(self.inputs.student)
        return {"declared_teacher": claim, "mismatch_allowed": self.inputs.allow_teacher_mismatch}

    def _runtime(self, name: PhaseName) -> dict[str, Any]:
        """What of the runtime decides the phase's result: only training is divided among devices."""
        settings = self.recipe.runtime.key_settings()
        shared = () if name in RANKED else ("devices", "vocabulary", "replicas")
        return {key: value for key, value in settings.items() if key not in shared}

    def _begins_with(self, number: int | None) -> Any:
        return self.student if number is None or number == 1 else self.distilled

    def _add(
        self, name: PhaseName, parts: dict[str, Any], section: Schema | None = None, number: int | None = None
    ) -> str:
        key = content_hash(
            {
                "phase": name,
                "recipe": section.key_settings() if section else None,
                "runtime": self._runtime(name),
                "prompting": self.recipe.prompting.key_settings(),
                **parts,
            }
        )
        self.phases.append(RunPhase(name=name, key=key, round=number))
        return key


def distillation_phases(
    recipe: Recipe, inputs: RunInputs, method: Method, *, sft: bool, benchmark: bool
) -> list[RunPhase]:
    """The phases of a distillation; `sft` says whether the student must first be fine-tuned on the teacher."""
    if method != "sft":
        require_held_out(recipe, inputs)
    chain = PhaseChain(recipe, inputs)
    if sft:
        chain.generate_responses().sft()
    rounds = recipe.distill.rounds if method == "lightning" else 1
    for number in range(1, rounds + 1) if method != "sft" else ():
        place = number if rounds > 1 else None
        if method == "lightning" and (inputs.cache is None or number > 1):
            chain.cache_of_rollouts(place)
        chain.distill(place)
    if benchmark:
        chain.benchmark()
    return chain.phases


def require_held_out(recipe: Recipe, inputs: RunInputs) -> None:
    """Raise ArgumentError `invalid_argument` unless there are prompts to judge a student by, and others to report."""
    evaluation, count = inputs.eval_prompts, recipe.distill.evaluate_prompts
    if recipe.distill.evaluate_steps is None or (
        evaluation is not None and (evaluation.rows is None or evaluation.rows > count)
    ):
        return
    raise ArgumentError(
        "invalid_argument",
        f"distill.evaluate_steps judges the student by the first {count} eval_prompts and reports on the others; "
        f"{'there are none' if evaluation is None else f'there are {evaluation.rows}'}.",
        value=f"distill.evaluate_steps={recipe.distill.evaluate_steps}",
        fix="Give more eval_prompts, lower distill.evaluate_prompts, or leave out distill.evaluate_steps.",
    )


def with_satisfied(phases: Iterable[RunPhase], made: Mapping[str, str]) -> list[RunPhase]:
    """The phases, each with the artifact that already holds its result; rollouts are held by their cache.

    `made` has the ids of artifacts by the key of what made them.
    """
    marked: list[RunPhase] = []
    for phase in phases:
        found = made.get(phase.key) if phase.name in PUBLISHED else None
        if phase.name == "score" and found and marked and marked[-1].name == "rollout":
            marked[-1] = marked[-1].model_copy(update={"satisfied_by": found})
        marked.append(phase.model_copy(update={"satisfied_by": found}))
    return marked


def request_hash(kind: str, phases: Iterable[RunPhase]) -> str:
    """The idempotency key of a run: its kind and its phases' keys, which hold every setting and input."""
    return content_hash({"kind": kind, "phases": [[phase.name, phase.key] for phase in phases]})


def cache_id_of(phases: Iterable[RunPhase]) -> str | None:
    """The id that the teacher cache made by these phases has or will have."""
    return next((_product_id("score", phase.key) for phase in phases if phase.name == "score"), None)


def _product_id(name: PhaseName, key: str, method: str = "lightning") -> str:
    made = product(name, key, method)
    if made is None:
        raise ValueError(f"phase {name} publishes nothing")
    return made.artifact_id


def _asserted(source: ModelInput | DataInput | None) -> str | None:
    claim = source.sft_teacher if source else None
    if claim is None or claim.basis == "proven":
        return None
    return claim.label() if claim.basis == "asserted" else "the teacher itself"


def data_sets(inputs: RunInputs) -> dict[str, DataInput]:
    """A run's prompts and responses by role."""
    roles = ("prompts", "sft_prompts", "eval_prompts", "responses")
    return {role: data for role in roles if (data := getattr(inputs, role)) is not None}


def _models(inputs: RunInputs) -> list[ModelInput]:
    named = [inputs.student, inputs.teacher, inputs.model, *inputs.baselines]
    return [model for model in named if model is not None]


def _identity_token(identity: ModelIdentity | None) -> dict[str, Any] | None:
    if identity is None:
        return None
    return identity.model_dump(include={"weights", "configuration", *TOKENIZER_HASHES}, exclude_none=True)


def _tokenizer_token(model: ModelInput | None) -> Any:
    if model is None or model.identity is None:
        return model_token(model)
    return model.identity.model_dump(include=set(TOKENIZER_HASHES), exclude_none=True)
