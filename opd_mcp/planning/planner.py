"""Plans: inputs resolved, phases keyed, consistency judged, costs estimated; nothing is started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_mcp.devices.hardware import Target, free_disk
from opd_mcp.planning.checks import (
    Findings,
    PlanInputs,
    judge_consistency,
    judge_evaluation,
    judge_files,
    judge_prompts,
    mean_prompt_tokens,
    require_matching_tokenizers,
)
from opd_mcp.planning.estimates import Estimator, resource_findings
from opd_mcp.planning.measured_caches import measured_cache, with_measures
from opd_mcp.planning.measured_speeds import measured_costs
from opd_mcp.planning.phases import FindArtifact, distillation_phases, with_satisfied
from opd_mcp.planning.quotas import foretold
from opd_mcp.planning.references import References, ResolvedModel
from opd_mcp.planning.run_requests import distillation_recipe, method_recipe
from opd_mcp.planning.workload import data_size, model_shape
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.plans import Finding, MethodEstimate, Plan, PlannedPhase
from opd_mcp.schemas.recipes import Method, Recipe, RuntimeRecipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs, RunKind, RunPhase, RunRequest

SAMPLE_ROWS = 3
SAMPLE_CHARACTERS = 160


@dataclass(frozen=True)
class Planner:
    """Makes plans within one workspace."""

    references: References
    find_artifact: FindArtifact
    target_of: Callable[[RuntimeRecipe], Target]

    def plan(self, arguments: PlanDistillation) -> Plan:
        """The plan for the arguments.

        Raises OpdError for inputs that cannot be used at all; what can be lifted by another argument is `blocking`.
        """
        recipe = distillation_recipe(arguments)
        target = self.target_of(recipe.runtime)
        found = Findings()
        inputs = self._inputs(arguments)
        require_matching_tokenizers(inputs.teacher, inputs.student)
        sft, verdict = judge_consistency(arguments, inputs, found)
        schema = self._schema(arguments, inputs, sft, found)
        judge_files(inputs, found)
        judge_evaluation(inputs, found)
        hygiene = judge_prompts(inputs, recipe.prompting.max_prompt_tokens, found)
        phases = self._phases(recipe, schema, arguments.method, sft)
        cache = measured_cache(self.references.store.artifacts, schema, phases)
        verdict = with_measures(verdict, cache, schema, phases, arguments.method, found)
        estimates = self._estimates(recipe, schema, inputs, arguments.method, sft, target)
        mine = next((estimate for estimate in estimates if estimate.method == arguments.method), None)
        if mine is not None:
            found.blocking += resource_findings(mine, target, free_disk(self.references.workspace.root))
        plan_id = f"plan-{content_hash(fingerprint(arguments, schema, recipe, phases))[:12]}"
        kind: RunKind = "sft" if arguments.method == "sft" else "distill"
        request = RunRequest(kind=kind, recipe=recipe, inputs=schema, phases=phases, plan_id=plan_id)
        quota = foretold(self.references.store, request, mine.seconds if mine else None)
        return Plan(
            plan_id=plan_id,
            method=arguments.method,
            inputs=schema,
            recipe=recipe,
            phases=[PlannedPhase.model_validate(phase.model_dump()) for phase in phases],
            consistency=verdict,
            estimates=estimates,
            sample=[_shortened(row.text()) for row in inputs.prompts.rows[:SAMPLE_ROWS]],
            hygiene=hygiene,
            rollouts=cache.manifest.rollouts if cache else None,
            blocking=found.blocking,
            warnings=[*quota, *found.warnings],
            next_action=_next_action(plan_id, found.blocking, quota),
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
            sft_teacher_path=references.path_of_claim(student.input, teacher.input),
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
            student=model_shape(inputs.student.facts),
            teacher=model_shape(inputs.teacher.facts),
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


def _next_action(plan_id: str, blocking: list[Finding], quota: list[Finding]) -> str:
    """The one next call; a quota that is full now may have room by then, so it blocks no plan."""
    if blocking:
        return f"Resolve {blocking[0].code} ({blocking[0].fix}) and call plan_distillation again."
    return quota[0].fix if quota else f"Call start_distillation(plan_id='{plan_id}')"


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[: SAMPLE_CHARACTERS - 1]}…"


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
