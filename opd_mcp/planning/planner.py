"""Plans: inputs resolved, phases keyed, consistency judged, costs estimated; nothing is started."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd_mcp.devices.hardware import Target, free_disk
from opd_mcp.identity.data.reading import first_response
from opd_mcp.identity.data.sources import is_glob, source_of
from opd_mcp.identity.files import path_signature
from opd_mcp.identity.models import is_untrained
from opd_mcp.identity.tokenizers import TokenDifference
from opd_mcp.planning.arms import compared_recipe, has_arms, with_arms
from opd_mcp.planning.asked_recipes import distillation_recipe, fitted_to, kind_of
from opd_mcp.planning.checks import (
    Findings,
    PlanInputs,
    differing_tokens,
    judge_adapters,
    judge_consistency,
    judge_data,
    judge_evaluation,
    judge_files,
    judge_kept,
    judge_prompts,
    judge_quantization,
    judge_special_tokens,
    judge_unsized,
    judged_golds,
    require_generating,
)
from opd_mcp.planning.costs.admission import quota_findings, resource_findings
from opd_mcp.planning.costs.estimates import estimate_of, fit_options, measured_costs, recipe_for_device
from opd_mcp.planning.costs.run_workload import workload_of
from opd_mcp.planning.costs.workload import DRAWN, Workload
from opd_mcp.planning.measured_caches import measured_cache, with_measures
from opd_mcp.planning.phases import PhaseChain, distillation_phases, with_satisfied
from opd_mcp.planning.prompts.preview import judge_clock, judge_sizes, plan_preview, text_facts
from opd_mcp.planning.prompts.text_work import Asked
from opd_mcp.planning.references import References, ResolvedModel, ResolvedPrompts, columns_of
from opd_mcp.planning.run_requests import RequestBuilder
from opd_mcp.planning.teachers import judge_teachers, resolved_teacher, with_self_claim
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import IntegrityError, PlanError, UnknownIdError
from opd_mcp.schemas.next_action import NextAction, next_call
from opd_mcp.schemas.plans import Finding, FitOption, MethodEstimate, Plan, PlannedPhase, WayToTrain
from opd_mcp.schemas.recipes import Method, Recipe, RuntimeRecipe
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.resolve import FarRate, far_rates, few_steps, require_even_replicas
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs, RunLabels, RunPhase, RunRequest
from opd_mcp.schemas.texts import byte_size, shortened
from opd_mcp.store.store import Store

SAMPLE_ROWS = 3
SAMPLE_CHARACTERS = 160
# Runs of a student that are looked at for a collapse.
LOOKED_AT = 20


@dataclass(frozen=True)
class Planner:
    """Makes plans within one workspace."""

    references: References
    builder: RequestBuilder
    target_of: Callable[[RuntimeRecipe, str | None], Target]

    def plan(self, arguments: PlanDistillation) -> Plan:
        """The plan for the arguments.

        Raises OpdError for inputs that cannot be used at all; what can be lifted by another argument is `blocking`.
        """
        asked, method, found = arguments, arguments.method, Findings()
        builder = self.builder.on(arguments.executor)
        recipe = distillation_recipe(arguments)  # a wrong override is told before any file is read
        inputs = self._inputs(arguments, recipe, found)
        arguments, reason = fitted_to(asked, inputs.student)
        recipe, found.warnings = builder.with_engines(distillation_recipe(arguments))
        target = self.target_of(recipe.runtime, builder.executor)
        require_even_replicas(recipe.runtime.replicas, target.devices)
        differing = differing_tokens(inputs.teacher, inputs.student)
        sft, verdict = judge_consistency(arguments, inputs, recipe, found)
        require_generating(inputs.student, *([inputs.teacher] if sft else []))
        judge_adapters(recipe, inputs.student.facts, sft, found)
        judge_quantization(recipe, sft, inputs.student, found)
        judge_rates(arguments, self._far_rates(recipe, inputs.student.input, method, sft), found)
        judge_training(arguments, recipe, inputs.student, sft, found)
        schema = self._schema(arguments, inputs, sft, found)
        facts = text_facts(self.references.texts, self._asked(inputs, recipe, schema, differing, found), found)
        judge_special_tokens(differing, facts, recipe.prompting, found)
        schema = _with_mean(schema, facts.mean_prompt_tokens or inputs.prompts.scan.guessed_tokens())
        inspect = self.references.models.inspect_model
        recipe = recipe_for_device(recipe, schema, target, DRAWN, arguments.overrides, inspect)
        judge_teachers(inputs, recipe, method, sft, found)
        judge_sizes(inputs, found)
        judge_unsized(inputs, found)
        judge_data(inputs, found)
        judge_files(inputs, found)
        judge_evaluation(inputs, found)
        judge_kept(recipe, schema.sft_prompts, found)
        grading = judged_golds(inputs, recipe.benchmark, found)
        hygiene = judge_prompts(inputs, facts, recipe.prompting.max_prompt_tokens, found)
        requests = self._requests(recipe, schema, method, sft)
        phases = requests[method].phases
        pending = [phase.name for phase in phases if phase.satisfied_by is None]
        preview = plan_preview(facts, inputs, recipe, pending, found)
        cache = measured_cache(self.references.store.artifacts, schema, phases)
        verdict = with_measures(verdict, cache, requests[method], found)
        estimates = self._estimates(requests, target)
        mine = next((estimate for estimate in estimates if estimate.method == method), None)
        if mine is not None:
            found.blocking += resource_findings(mine, target, free_disk(self.references.workspace.root))
        fits = fit_options(requests[method], target, inspect)
        found.blocking = [with_way_to_fit(finding, arguments, fits) for finding in found.blocking]
        plan_id = f"plan-{content_hash(fingerprint(asked, schema, recipe, phases))[:12]}"
        request = requests[method].model_copy(update={"plan_id": plan_id})
        quota = quota_findings(self.references.store, request, mine.seconds if mine else None)
        plan = Plan(
            plan_id=plan_id,
            method=method,
            inputs=schema,
            recipe=recipe,
            phases=[PlannedPhase.model_validate(phase.model_dump()) for phase in phases],
            consistency=verdict,
            estimates=estimates,
            fits=fits,
            sample=[shortened(row.text(), SAMPLE_CHARACTERS) for row in inputs.prompts.scan.first[:SAMPLE_ROWS]],
            preview=preview,
            grading=grading,
            hygiene=hygiene,
            rollouts=cache.manifest.rollouts if cache else None,
            blocking=found.blocking,
            warnings=[*quota, *found.warnings],
            preset_reason=reason,
            next_action=_next_action(plan_id, asked, found.blocking, quota),
        )
        if not has_arms(asked):
            return plan
        plan = with_arms(asked, plan, self.workload(plan), self.plan)
        return plan.model_copy(update={"next_action": _next_action(plan_id, asked, plan.blocking, quota)})

    def workload(self, plan: Plan) -> Workload | None:
        """The work of a plan's phases; None while one of its models is still to be fetched."""
        return workload_of(plan.recipe, plan.inputs, inspect=self.references.models.inspect_model)

    def _inputs(self, arguments: PlanDistillation, recipe: Recipe, found: Findings) -> PlanInputs:
        references, prompting = self.references, recipe.prompting

        def prompts_of(argument: str) -> ResolvedPrompts | None:
            value, columns = getattr(arguments, argument), columns_of(arguments.columns, argument)
            # A token is at least one byte, so only longer texts can be too long.
            return None if value is None else references.prompts(value, columns, long_bytes=prompting.max_prompt_tokens)

        prompts, sft_prompts, eval_prompts = map(prompts_of, ("prompts", "sft_prompts", "eval_prompts"))
        assert prompts is not None, "a plan has prompts"
        seen = prompts.context(prompting)
        teacher = resolved_teacher(references, arguments.teacher).as_teacher(seen)
        student = references.sft_student(arguments.student, arguments.declared_teacher, seen)
        if recipe.sft.skip and arguments.method != "sft":
            student = with_self_claim(teacher, student, recipe, found)
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

    def _far_rates(self, recipe: Recipe, student: ModelInput, method: Method, sft: bool) -> list[FarRate]:
        """The rates that do not fit the student; none is called too low where a run has collapsed at what fits."""
        stages = [*(["sft"] if sft else []), *([] if method == "sft" else ["distill"])]
        far = far_rates(recipe, stages, student.parameters)
        if not any(rate.too_low for rate in far):
            return far
        collapsed = collapsed_rates(self.references.store, student.reference)
        return [rate for rate in far if not rate.too_low or collapsed.get(rate.key, math.inf) > rate.fitting]

    def _schema(self, arguments: PlanDistillation, inputs: PlanInputs, sft: bool, found: Findings) -> RunInputs:
        update: dict[str, object] = {}
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

    def _asked(
        self,
        inputs: PlanInputs,
        recipe: Recipe,
        schema: RunInputs,
        differing: Sequence[TokenDifference],
        found: Findings,
    ) -> Asked | None:
        """What is asked of the tokenizer that both models will use, with a row of the responses where they are here."""
        model = inputs.teacher.facts or inputs.student.facts
        if model is None:
            return None
        taught = None
        if schema.sft_prompts is not None:
            with suppress(IntegrityError):  # damaged responses are made anew by the run
                made = self.builder.artifacts.find(str(PhaseChain(recipe, schema).generate_responses().responses))
                taught = first_response(made.path) if made else None
        watched, turns = tuple(difference.id for difference in differing), recipe.sft.train_turns
        moment = judge_clock(model, datetime.now(UTC), found)
        return Asked(model.path, recipe.prompting, inputs.prompts.scan, turns, taught, watched, moment)

    def _requests(self, recipe: Recipe, inputs: RunInputs, method: Method, sft: bool) -> dict[Method, RunRequest]:
        """By method, what it would run: the asked one, and the two to compare it with; several teachers have no live.

        A start that was asked for "sft" would need the SFT for the two others as well.
        """
        requests, several = {}, inputs.teacher is not None and inputs.teacher.members is not None
        compared: tuple[Method, ...] = ("lightning",) if several else ("lightning", "live")
        for name in dict.fromkeys((method, *compared)):
            other = compared_recipe(recipe, method, name)
            phases = distillation_phases(other, inputs, name, sft=sft, benchmark=True)
            requests[name] = RunRequest(kind=kind_of(name), recipe=other, inputs=inputs, phases=phases)
        made = self.builder.artifacts.made_by([phase.key for asked in requests.values() for phase in asked.phases])
        return {
            name: asked.model_copy(update={"phases": with_satisfied(asked.phases, made)})
            for name, asked in requests.items()
        }

    def _estimates(self, requests: Mapping[Method, RunRequest], target: Target) -> list[MethodEstimate]:
        measured = measured_costs(self.references.workspace.artifacts)
        estimates = []
        for name, request in requests.items():
            estimate = estimate_of(request, target, measured, self.references.models.inspect_model)
            if estimate is not None:
                estimates.append(estimate.model_copy(update={"method": name}))
        return estimates


class PlanMemory:
    """The plans that were made last, each known for as long as no file that it read has changed."""

    def __init__(self, size: int = 16) -> None:
        self._plans: OrderedDict[str, tuple[Plan, str]] = OrderedDict()
        self._size = size

    def keep(self, arguments: PlanDistillation, plan: Plan) -> None:
        """Remember what was planned for the arguments."""
        self._plans[content_hash(unlabelled(arguments))] = plan, files_signature(plan.inputs)
        while len(self._plans) > self._size:
            self._plans.popitem(last=False)

    def unblocked(self, arguments: PlanDistillation) -> Plan | None:
        """The plan for these arguments where nothing stood in its way and all it read is as it was."""
        plan, signature = self._plans.get(content_hash(unlabelled(arguments)), (None, ""))
        return plan if plan and not plan.blocking and signature == files_signature(plan.inputs) else None


def unlabelled(arguments: PlanDistillation) -> dict[str, Any]:
    """The arguments without what the run is called: the same work under another name is the same plan."""
    values = arguments.model_dump(mode="json", exclude_none=True, exclude=set(RunLabels.model_fields))
    alone = {"baseline": [], "seeds": 1}  # as plans of earlier versions, which had no arms
    return {name: value for name, value in values.items() if alone.get(name, ()) != value}


def files_signature(inputs: RunInputs) -> str:
    """What changes with any file of a run's inputs: names, sizes and times, not contents."""
    sources = [getattr(inputs, name) for name in type(inputs).model_fields]
    sources += [*(inputs.teacher.members or {}).values()] if inputs.teacher else []
    paths = [Path(source.path) for source in sources if isinstance(source, ModelInput | DataInput) and source.path]
    files = [file for path in paths for file in ((path,) if not is_glob(path) else source_of(path).files)]
    return content_hash([path_signature(file) for file in files])


def _with_mean(inputs: RunInputs, mean: float | None) -> RunInputs:
    """The inputs with the mean tokens of the prompts, by which the run's cost is estimated."""
    assert inputs.prompts is not None, "a plan has prompts"
    update: dict[str, object] = {"prompts": inputs.prompts.model_copy(update={"mean_prompt_tokens": mean})}
    if inputs.sft_prompts == inputs.prompts:
        update["sft_prompts"] = update["prompts"]
    return inputs.model_copy(update=update)


def with_way_to_fit(finding: Finding, arguments: PlanDistillation, fits: Sequence[FitOption]) -> Finding:
    """A shortage of memory with the plan that would fit: the first way that does, or that none does."""
    if finding.code != "not_enough_memory" or not fits:
        return finding
    option = next((option for option in fits if option.fits), None)
    if option is None:
        return finding.model_copy(
            update={"fix": f"Neither full training nor LoRA, 4-bit or not, fits with smaller batches. {finding.fix}"}
        )
    ways: dict[WayToTrain, str] = {
        "full": "Training all weights with smaller batches",
        "lora": "LoRA (docs/adapters.md)",
        "lora_4bit": "LoRA on a 4-bit base, whose dequantised weights are then the student (docs/adapters.md),",
    }
    what = ways[option.name]
    given = arguments.to_dict() | {"overrides": {**arguments.overrides, **option.overrides}}
    return finding.model_copy(
        update={
            "fix": f"{what} fits, with about {byte_size(option.peak_memory_bytes)}: plan again with these overrides. "
            "Or choose smaller models, or wait until memory is free.",
            "call": next_call("plan_distillation", **given),
        }
    )


def _next_action(
    plan_id: str, arguments: PlanDistillation, blocking: list[Finding], quota: list[Finding]
) -> NextAction:
    """The one next call; a quota that is full now may have room by then, so it blocks no plan.

    After a blocking finding it is the finding's own, or this plan's with what lifts all that overrides can lift. Where
    that is the caller's choice there is no call: the same arguments would be blocked again.
    """
    if not blocking:
        return next_call("start_distillation", quota[0].fix if quota else "Nothing blocks this plan.", plan_id=plan_id)
    why = f"Resolve {blocking[0].code} and plan again: {blocking[0].fix}"
    call = blocking[0].call
    if call is not None and call.tool == "plan_distillation":
        return call.with_why(why)
    if blocking[0].overrides is not None:
        lifted = [finding for finding in blocking if finding.overrides is not None]
        changes = {key: value for finding in lifted for key, value in (finding.overrides or {}).items()}
        codes, fixes = (
            dict.fromkeys(values) for values in zip(*((each.code, each.fix) for each in lifted), strict=True)
        )
        return plan_again(arguments, f"Resolve {', '.join(codes)} and plan again: {' '.join(fixes)}", changes)
    return NextAction(why=why)


def collapsed_rates(store: Store, student: str) -> dict[str, float]:
    """By key, the lowest learning rate at which one of the newest trainings of a student has collapsed."""
    found: dict[str, float] = {}
    rows = [row for row in store.index.runs() if row.student == student and row.kind in ("sft", "distill")]
    for row in rows[:LOOKED_AT]:
        with suppress(UnknownIdError, IntegrityError):  # deleted meanwhile, or damaged
            if any(alert.code == "collapse" for alert in store.view(row.run_id).alerts):
                rate = getattr(store.record(row.run_id).request.recipe, row.kind).optimizer.learning_rate
                key = f"{row.kind}.optimizer.learning_rate"
                found[key] = min(rate, found.get(key, rate))
    return found


def judge_rates(arguments: PlanDistillation, far: Sequence[FarRate], found: Findings) -> None:
    """Warn of learning rates that do not fit a student of this size, with the plan whose rates do."""
    call = plan_again(arguments, overrides={key: value for rate in far for key, value in rate.changes.items()})
    for rate in far:
        found.warn(rate.code, rate.message, rate.fix, call)


def judge_training(
    arguments: PlanDistillation, recipe: Recipe, resolved: ResolvedModel, sft: bool, found: Findings
) -> None:
    """Warn of a small student's few steps, and of a student never trained, which most presets teach little."""
    few = None if arguments.method == "sft" else few_steps(recipe, resolved.input.parameters)
    if few is not None:
        found.warn(few.code, few.message, few.fix, plan_again(arguments, overrides=few.changes))
    student = resolved.facts
    if not sft or recipe.preset == "demo" or student is None or student.adapter is not None:
        return
    if is_untrained(student.path):
        found.warn(
            "student_untrained",
            f"The student's weights are as they were initialised: its {student.parameters / 1e6:.3g}M parameters were "
            f"never trained. Preset '{recipe.preset}' fine-tunes a pretrained student, for {recipe.sft.steps} steps.",
            "Give a pretrained student, or raise 'sft.steps' and the learning rates to those of a pretraining.",
        )


def plan_again(
    arguments: PlanDistillation, why: str | None = None, overrides: Mapping[str, object] | None = None
) -> NextAction:
    """The call that plans the same with further overrides; inline prompts, which the caller has, are to be added."""
    given = arguments.to_dict() | {"overrides": {**arguments.overrides, **(overrides or {})}}
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(arguments).model_fields.items()
    }
    inline = [name for name, value in given.items() if isinstance(value, list) and name not in ("tags", "baseline")]
    changed = {name: value for name, value in given.items() if name not in inline and value != defaults[name]}
    return next_call("plan_distillation", why, missing=inline, **changed)


def fingerprint(
    arguments: PlanDistillation, inputs: RunInputs, recipe: Recipe, phases: Sequence[RunPhase | PlannedPhase]
) -> dict[str, object]:
    """What a plan stands for, part by part; estimates, free memory and finished phases are not in it."""
    parts: dict[str, object] = {"arguments": unlabelled(arguments), "recipe": recipe.to_dict()}
    for name, value in inputs:
        part = value.to_dict() if hasattr(value, "to_dict") else value
        if isinstance(value, DataInput):  # how it was read follows from what it is
            part.pop("understood", None)
        if isinstance(value, ModelInput) and value.path is None:  # sizes of the Hub's, which need not answer
            part = {key: known for key, known in part.items() if key not in ("parameters", "hub_sizes")}
        parts[f"inputs.{name}"] = part
    for of_benchmarks in ("inputs.baselines", "inputs.suite"):
        parts.pop(of_benchmarks)
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


def require_unblocked(plan: Plan) -> None:
    """Raise PlanError `plan_blocked` with what blocks a plan."""
    if plan.blocking:
        raise PlanError(
            "plan_blocked",
            " ".join(f"[{finding.code}] {finding.message}" for finding in plan.blocking),
            value=plan.plan_id,
            fix=" ".join(finding.fix for finding in plan.blocking),
            call=next((finding.call for finding in plan.blocking if finding.call), plan.next_action),
        )
