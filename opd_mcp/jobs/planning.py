"""Plans: inputs resolved, phases keyed, consistency judged, costs estimated; nothing is started."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_mcp.identity.consistency import consistency, require_consistent
from opd_mcp.identity.tokenizers import require_same_tokens
from opd_mcp.jobs.devices import Target, free_disk, target_of
from opd_mcp.jobs.estimates import Estimator, measured_costs, resource_findings
from opd_mcp.jobs.phases import FindArtifact, distillation_phases, with_satisfied
from opd_mcp.jobs.references import References, ResolvedModel, ResolvedPrompts
from opd_mcp.jobs.tokens import mean_prompt_tokens
from opd_mcp.jobs.workload import ModelSize, data_size
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.plans import ConsistencyVerdict, Finding, MethodEstimate, Plan, PlannedPhase
from opd_mcp.schemas.recipes import Method, Recipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunInputs, RunPhase

SAMPLE_ROWS = 3
SAMPLE_CHARACTERS = 160


@dataclass(frozen=True)
class PlanInputs:
    """The resolved inputs of a distillation with what only planning needs of them."""

    student: ResolvedModel
    teacher: ResolvedModel
    prompts: ResolvedPrompts
    sft_prompts: ResolvedPrompts | None
    eval_prompts: ResolvedPrompts | None
    schema: RunInputs


@dataclass
class Findings:
    """What blocks a plan and what its reader should know."""

    blocking: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def warn(self, code: str, message: str, fix: str) -> None:
        """Add a warning."""
        self.warnings.append(Finding(code=code, message=message, fix=fix))


@dataclass(frozen=True)
class Planner:
    """Makes plans within one workspace."""

    references: References
    find_artifact: FindArtifact

    def plan(self, arguments: PlanDistillation) -> Plan:
        """The plan for the arguments.

        Raises OpdError for inputs that cannot be used at all; what can be lifted by another argument is `blocking`.
        """
        recipe = distillation_recipe(arguments)
        target = target_of(recipe.runtime)
        found = Findings()
        inputs = self._inputs(arguments)
        require_matching_tokenizers(inputs.teacher, inputs.student)
        sft, verdict = judge_consistency(arguments, inputs, found)
        schema = self._schema(arguments, inputs, sft, found)
        self._judge_evaluation(arguments, inputs, found)
        phases = self._phases(recipe, schema, arguments.method, sft)
        estimates = self._estimates(recipe, schema, inputs, arguments.method, sft, target)
        if estimates:
            mine = next(estimate for estimate in estimates if estimate.method == arguments.method)
            found.blocking += resource_findings(mine, target, free_disk(self.references.workspace.root))
        plan_id = f"plan-{content_hash(fingerprint(arguments, schema, recipe, phases))[:12]}"
        return Plan(
            plan_id=plan_id,
            method=arguments.method,
            inputs=schema,
            recipe=recipe,
            phases=[PlannedPhase.model_validate(phase.model_dump()) for phase in phases],
            consistency=verdict,
            estimates=estimates,
            sample=[_shortened(row.text()) for row in inputs.prompts.rows[:SAMPLE_ROWS]],
            blocking=found.blocking,
            warnings=found.warnings,
            next_action=f"Call start_distillation(plan_id='{plan_id}')"
            if not found.blocking
            else f"Resolve {found.blocking[0].code} ({found.blocking[0].fix}) and call plan_distillation again.",
        )

    def _inputs(self, arguments: PlanDistillation) -> PlanInputs:
        references = self.references
        student, teacher = references.model(arguments.student), references.model(arguments.teacher)
        prompts = references.prompts(arguments.prompts)
        sft_prompts = None if arguments.sft_prompts is None else references.prompts(arguments.sft_prompts)
        eval_prompts = None if arguments.eval_prompts is None else references.prompts(arguments.eval_prompts)
        if student.input.sft_teacher is None and arguments.declared_teacher is not None:
            claim = references.claim(arguments.declared_teacher)
            student = ResolvedModel(student.input.model_copy(update={"sft_teacher": claim}), student.facts)
        schema = RunInputs(
            student=student.input,
            teacher=teacher.input,
            prompts=prompts.input,
            eval_prompts=eval_prompts.input if eval_prompts else None,
            declared_teacher=arguments.declared_teacher,
            allow_teacher_mismatch=arguments.allow_teacher_mismatch,
        )
        return PlanInputs(student, teacher, prompts, sft_prompts, eval_prompts, schema)

    def _schema(self, arguments: PlanDistillation, inputs: PlanInputs, sft: bool, found: Findings) -> RunInputs:
        tokenizer = inputs.teacher.facts or inputs.student.facts
        mean = mean_prompt_tokens(tokenizer.path, inputs.prompts.rows) if tokenizer else None
        prompts = inputs.prompts.input.model_copy(update={"mean_prompt_tokens": mean})
        update: dict[str, object] = {"prompts": prompts}
        if sft:
            if inputs.sft_prompts is None:
                found.warn(
                    "sft_prompts_default",
                    "No sft_prompts were given: the student is fine-tuned on the teacher's answers to the distillation "
                    "prompts.",
                    "Give sft_prompts=… to use other prompts for that stage.",
                )
            update["sft_prompts"] = (inputs.sft_prompts or inputs.prompts).input
        elif inputs.sft_prompts is not None:
            found.warn(
                "sft_prompts_unused",
                "The student already has an SFT teacher, so sft_prompts are not used.",
                "Give the student as it was before its SFT to fine-tune it again.",
            )
        return inputs.schema.model_copy(update=update)

    def _judge_evaluation(self, arguments: PlanDistillation, inputs: PlanInputs, found: Findings) -> None:
        if inputs.eval_prompts is None:
            found.warn(
                "no_eval_prompts",
                "Without eval_prompts no accuracy is measured; the report holds the reverse KL to the teacher on the "
                "distillation prompts.",
                "Give eval_prompts=… with answers that are in no training set.",
            )
            return
        if inputs.eval_prompts.input.rows_with_answer == 0:
            found.warn(
                "no_answers",
                "The eval prompts have no `answer`, so the report holds the reverse KL to the teacher only.",
                "Add an `answer` to each eval prompt.",
            )
        training = {row.text() for used in (inputs.prompts, inputs.sft_prompts) if used for row in used.rows}
        overlap = sum(row.text() in training for row in inputs.eval_prompts.rows)
        if overlap:
            found.warn(
                "eval_overlap",
                f"{overlap} of {len(inputs.eval_prompts.rows)} eval prompts are also training prompts; accuracy on "
                "them proves nothing.",
                "Give eval_prompts that are in no training set.",
            )

    def _phases(self, recipe: Recipe, schema: RunInputs, method: Method, sft: bool) -> list[RunPhase]:
        chain = distillation_phases(recipe, schema, method, sft=sft, benchmark=True)
        return with_satisfied(chain.phases, method, self.find_artifact)

    def _estimates(
        self, recipe: Recipe, schema: RunInputs, inputs: PlanInputs, method: Method, sft: bool, target: Target
    ) -> list[MethodEstimate]:
        if inputs.student.facts is None or inputs.teacher.facts is None:
            return []
        estimator = Estimator(
            recipe=recipe,
            student=ModelSize.of(inputs.student.facts),
            teacher=ModelSize.of(inputs.teacher.facts),
            data=data_size(schema),
            target=target,
            measured=measured_costs(self.references.workspace.artifacts),
        )
        estimates = []
        for name in dict.fromkeys((method, "lightning", "live")):
            other = method_recipe(recipe, name)
            # A start that was asked for "sft" would need the SFT for the two others as well.
            estimates.append(estimator.method(name, self._phases(other, schema, name, sft)))
        return estimates


def distillation_recipe(arguments: PlanDistillation) -> Recipe:
    """The resolved recipe with the method and estimator applied.

    Raises ArgumentError: `unknown_override`, or `invalid_argument` for an override that contradicts an argument.
    """
    for key, argument in (("distill.method", arguments.method), ("distill.estimator", arguments.estimator)):
        if arguments.overrides.get(key, argument) != argument:
            name = key.removeprefix("distill.")
            raise ArgumentError(
                "invalid_argument",
                f"The override {key} contradicts the argument {name}={argument!r}.",
                value=arguments.overrides[key],
                fix=f"Leave out the override and give {name}=….",
            )
    recipe = resolve_recipe(arguments.preset, arguments.overrides)
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"estimator": arguments.estimator})})
    return method_recipe(recipe, arguments.method)


def method_recipe(recipe: Recipe, method: Method) -> Recipe:
    """The recipe for a method; a cache for the top-k estimator holds at least the k that it trains on."""
    if method == "sft":
        return recipe
    distill = recipe.distill.model_copy(update={"method": method})
    update: dict[str, object] = {"distill": distill}
    if method == "lightning" and distill.estimator == "topk_reverse_kl" and recipe.score.topk < distill.topk:
        update["score"] = recipe.score.model_copy(update={"topk": distill.topk})
    return recipe.model_copy(update=update)


def require_matching_tokenizers(teacher: ResolvedModel, student: ResolvedModel) -> None:
    """Raise ConsistencyError `tokenizer_mismatch` for two models that are here and whose tokens differ."""
    if teacher.facts is None or student.facts is None:
        return
    if teacher.facts.identity.tokenizer != student.facts.identity.tokenizer:
        require_same_tokens(teacher.facts.path, student.facts.path)


def judge_consistency(
    arguments: PlanDistillation, inputs: PlanInputs, found: Findings
) -> tuple[bool, ConsistencyVerdict]:
    """Whether the student needs its SFT first, and the verdict on the teacher; adds what stands in the way."""
    teacher, claim = inputs.teacher.input, inputs.student.input.sft_teacher
    if arguments.method == "sft" or claim is None:
        verdict = ConsistencyVerdict(
            status="consistent",
            basis="by_construction",
            teacher=teacher.identity,
            mismatch_allowed=arguments.allow_teacher_mismatch,
        )
        return True, verdict
    if teacher.identity is None or inputs.student.input.identity is None:
        found.warn(
            "checked_after_fetch",
            "A model is still to be fetched from the Hub; tokenizers and teacher consistency are checked after that.",
            "Fetch the models first, and give their paths, to know before the start.",
        )
        if teacher.identity is None:
            return False, ConsistencyVerdict(status="unknown", sft_teacher=claim)
    if arguments.declared_teacher is not None and claim.basis == "proven":
        found.warn(
            "declared_teacher_unused",
            f"The student's lineage proves its SFT teacher, {claim.label()}; declared_teacher is not used.",
            "Leave out declared_teacher.",
        )
    verdict = consistency(teacher.identity, claim, allowed=arguments.allow_teacher_mismatch)
    if verdict.status == "mismatch":
        _add_mismatch(verdict, arguments.allow_teacher_mismatch, found)
    elif claim.basis == "asserted":
        found.warn(
            "lineage_asserted",
            f"That the student was fine-tuned on responses of {claim.label()} is asserted by you, not proven.",
            "Give a student made by start_sft, or one without declared_teacher, to have it proven.",
        )
    return False, verdict


def _add_mismatch(verdict: ConsistencyVerdict, allowed: bool, found: Findings) -> None:
    assert verdict.teacher is not None
    try:
        require_consistent(verdict.teacher, verdict.sft_teacher, allowed=False)
    except ConsistencyError as error:
        if allowed:
            found.warn(error.code, f"{error.message} You allowed it; the report records it.", error.fix)
        else:
            found.blocking.append(Finding(code=error.code, message=error.message, fix=error.fix))


def fingerprint(
    arguments: PlanDistillation, inputs: RunInputs, recipe: Recipe, phases: Sequence[RunPhase | PlannedPhase]
) -> dict[str, object]:
    """What a plan stands for, part by part; estimates, free memory and finished phases are not in it."""
    parts: dict[str, object] = {"arguments": arguments.to_dict(), "recipe": recipe.to_dict()}
    for name, value in inputs:
        parts[f"inputs.{name}"] = value.to_dict() if hasattr(value, "to_dict") else value
    parts.pop("inputs.baselines")
    parts["phases"] = [[phase.name, phase.key] for phase in phases]
    return parts


def changed_parts(arguments: PlanDistillation, saved: Plan, now: Plan) -> list[str]:
    """What differs between a saved plan and what its arguments give now, e.g. `student.identity.weights`."""
    before, after = (fingerprint(arguments, plan.inputs, plan.recipe, plan.phases) for plan in (saved, now))
    changed = [path for part in before for path in _differences(part, before[part], after[part])]
    # Keys follow from everything else, so they are named only when nothing else explains them.
    causes = [path.removeprefix("inputs.") for path in changed if not path.startswith("phases")]
    return causes or changed


def _differences(path: str, before: object, after: object) -> list[str]:
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        return [found for name in names for found in _differences(f"{path}.{name}", before.get(name), after.get(name))]
    return [path]


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[: SAMPLE_CHARACTERS - 1]}…"
