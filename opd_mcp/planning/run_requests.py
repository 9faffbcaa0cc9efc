"""From a tool's arguments, a plan or a cache to a run's request: recipe, inputs, keyed phases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_mcp.devices.hardware import Target, declared_target, target_of
from opd_mcp.grading.golds import no_answers_to_keep
from opd_mcp.identity.consistency import cache_claim, require_consistent
from opd_mcp.identity.data.scan import scan_of_rows
from opd_mcp.identity.tokenizers import TokenDifference
from opd_mcp.planning.adapter_bases import require_targets
from opd_mcp.planning.asked_recipes import distillation_recipe, fitted_to, kind_of, method_recipe, usable_recipe
from opd_mcp.planning.checks import (
    Findings,
    differing_tokens,
    judge_special_tokens,
    lacks_answers,
    require_generating,
    require_own_rollouts,
    require_positions,
    require_usable_ids,
)
from opd_mcp.planning.costs.estimates import recipe_for_device
from opd_mcp.planning.engines import with_engines
from opd_mcp.planning.phases import PhaseChain, distillation_phases, with_satisfied
from opd_mcp.planning.prompts.text_work import Asked
from opd_mcp.planning.references import (
    References,
    ResolvedCache,
    ResolvedModel,
    ResolvedPrompts,
    ResolvedResponses,
    columns_of,
)
from opd_mcp.planning.suites import with_suite
from opd_mcp.planning.teachers import (
    require_own_prompts,
    require_self_claim,
    require_teachers_usable,
    resolved_teacher,
)
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.executors import LOCAL
from opd_mcp.schemas.plans import Finding, Plan
from opd_mcp.schemas.recipes import Preset, Recipe, RuntimeRecipe, SampleRecipe, Sampling
from opd_mcp.schemas.requests import (
    AssessOverhead,
    BenchmarkStudent,
    BuildTeacherCache,
    GenerateTeacherResponses,
    SampleModel,
    StartDistillation,
    StartSft,
    Sweep,
)
from opd_mcp.schemas.runs import (
    TOKENIZER_FOLDER,
    DataInput,
    ModelInput,
    PhaseName,
    RunInputs,
    RunKind,
    RunPhase,
    RunRequest,
)
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.workspace import named_executor, read_settings

# The section of the recipe that says how many tokens are drawn after the prompts of a request.
DRAWN_BY = {
    GenerateTeacherResponses: "responses",
    BuildTeacherCache: "rollout",
    BenchmarkStudent: "benchmark",
    AssessOverhead: "rollout",
}
DRAWN_TO_ASSESS: tuple[PhaseName, ...] = ("generate_responses", "rollout")


@dataclass(frozen=True)
class RequestBuilder:
    """Builds run requests within one workspace; raises OpdError for anything that must not be started."""

    references: References
    artifacts: ArtifactStore
    executor: str | None = None
    """Whose machines the runs are for; None: this one."""

    def on(self, executor: str | None) -> "RequestBuilder":
        """A builder of runs on this executor; raises ArgumentError `unknown_executor`."""
        if executor in (None, LOCAL):
            return self
        named_executor(self.references.workspace, str(executor))
        return replace(self, executor=executor)

    def target(self, runtime: RuntimeRecipe) -> Target:
        """The device of such a run; raises ResourceError `device_unavailable`."""
        if self.executor is None:
            return target_of(runtime)
        return declared_target(runtime, self.executor, named_executor(self.references.workspace, self.executor))

    def responses(self, arguments: GenerateTeacherResponses) -> RunRequest:
        """The teacher answers prompts."""
        recipe = self._recipe(arguments.preset, arguments.overrides)
        teacher = resolved_teacher(self.references, arguments.teacher)
        require_generating(teacher)
        require_teachers_usable(teacher, None, recipe, "lightning")
        prompts = self._prompts(arguments, [teacher], recipe)
        require_own_prompts(teacher, prompts)
        inputs = RunInputs(teacher=teacher.input, prompts=prompts.input)
        if recipe.responses.keep == "right" and lacks_answers(inputs.prompts):
            raise no_answers_to_keep()
        recipe = self._for_device(recipe, inputs, "generate_responses", arguments.overrides)
        return self.request("generate", recipe, inputs, PhaseChain(recipe, inputs).generate_responses().phases)

    def sft(self, arguments: StartSft) -> RunRequest:
        """The student is fine-tuned on responses; whose they are is proven by lineage, else as declared.

        It adopts the tokenizer and template that came with the responses, else those of a declared teacher that is
        here. Raises ConsistencyError `tokenizer_mismatch` where that one's tokens differ from the student's, and as
        `require_usable_ids`.
        """
        recipe = usable_recipe(arguments.preset, arguments.overrides, target=self.target)
        student = self.references.model(arguments.student)
        require_targets({"sft": recipe.sft}, student.facts)
        columns = columns_of(arguments.columns, "responses")
        responses = self.references.responses(arguments.responses, arguments.declared_teacher, columns)
        teacher = None
        saved = Path(str(responses.input.path)) / TOKENIZER_FOLDER
        if not saved.is_dir():
            teacher = self.references.declared_teacher(arguments.declared_teacher)
        if responses.header is not None:
            facts = teacher.facts if teacher else student.facts
            tokenizer = saved if saved.is_dir() else facts.path if facts else None
            if tokenizer is not None:
                require_usable_ids(responses.header.raw_ids, tokenizer, student.facts, recipe.sft)
        if teacher is not None:
            self._require_fitting_tokens(teacher, student, responses, recipe)
        inputs = RunInputs(
            student=student.input,
            teacher=teacher.input if teacher else None,
            responses=responses.input,
            declared_teacher=arguments.declared_teacher,
        )
        return self.request("sft", recipe, inputs, PhaseChain(recipe, inputs).sft().phases)

    def cache(self, arguments: BuildTeacherCache) -> RunRequest:
        """The SFT student's rollouts are drawn and scored.

        Raises ConsistencyError `teacher_mismatch`, `lineage_missing` or `tokenizer_mismatch`.
        """
        given = {f"score.{name}": getattr(arguments, name) for name in ("topk", "dtype", "on_truncated")}
        recipe = self._recipe(arguments.preset, arguments.overrides, given)
        if arguments.teacher_url is None:
            teacher = resolved_teacher(self.references, arguments.teacher)
        elif not isinstance(arguments.teacher, str):
            raise ArgumentError(
                "invalid_argument",
                "teacher_url is the server of one teacher, and teacher names several.",
                value=arguments.teacher_url,
                fix="Leave out teacher_url, or build a cache per teacher.",
            )
        else:
            teacher = self.references.remote_teacher(arguments.teacher, arguments.teacher_url)
        student = self.references.model(arguments.student)
        require_generating(student)
        differing = differing_tokens(teacher, student)
        prompts = self._prompts(arguments, [teacher, student] if teacher.facts else [student], recipe, differing)
        require_teachers_usable(teacher, student, recipe, "lightning")
        require_own_prompts(teacher, prompts)
        seen = prompts.context(recipe.prompting)
        teacher = teacher.as_teacher(seen)
        student = self.references.sft_student(arguments.student, arguments.declared_teacher, seen)
        if recipe.sft.skip:
            student = require_self_claim(teacher, student, recipe)
        allowed = arguments.allow_teacher_mismatch
        if teacher.input.identity is not None:
            require_consistent(teacher.input.identity, student.input.sft_teacher, allowed=allowed)
        inputs = RunInputs(
            student=student.input,
            teacher=teacher.input,
            prompts=prompts.input,
            declared_teacher=arguments.declared_teacher,
            sft_teacher_path=self.references.path_of_claim(student.input, teacher.input),
            allow_teacher_mismatch=allowed,
        )
        recipe = self._for_device(recipe, inputs, "rollout", arguments.overrides)
        return self.request("cache", recipe, inputs, PhaseChain(recipe, inputs).cache_of_rollouts().phases)

    def from_plan(self, plan: Plan, *, benchmark: bool) -> RunRequest:
        """What an unblocked plan stands for, with or without the benchmark that ends it."""
        kept = [phase for phase in plan.phases if benchmark or phase.name != "benchmark"]
        phases = [RunPhase.model_validate(phase.model_dump()) for phase in kept]
        kind = kind_of(plan.method)
        return RunRequest(
            kind=kind,
            recipe=plan.recipe,
            inputs=plan.inputs,
            phases=phases,
            plan_id=plan.plan_id,
            executor=self.executor,
        )

    def from_cache(self, arguments: StartDistillation) -> RunRequest:
        """The student is distilled from a cache of its own rollouts.

        Raises ConsistencyError `behaviour_mismatch`, `teacher_mismatch` or `lineage_missing`.
        """
        if arguments.method != "lightning":
            raise ArgumentError(
                "invalid_argument",
                "A teacher cache is for the method 'lightning'.",
                value=arguments.method,
                fix="Leave out method, or leave out cache_id and give teacher and prompts.",
            )
        distillation_recipe(arguments)  # a wrong override is told before any file is read
        cache = self.references.cache(str(arguments.cache_id))
        student, inputs = self._cache_inputs(cache, arguments)
        return self._of_cache(cache, student, inputs, fitted_to(arguments, student)[0])

    def sweep(self, arguments: Sweep, points: Sequence[Mapping[str, Any]]) -> list[RunRequest]:
        """A distillation from the cache for each point, which has the overrides of its own; inputs are read once.

        The student is by default the one whose rollouts the cache holds, the evaluation that of the cache's run, the
        preset that of the student's size.
        Raises as `from_cache`, and ArgumentError `invalid_argument` where the student of the cache is not known.
        """
        cache = self.references.cache(arguments.cache_id)
        shared = {name: getattr(arguments, name) for name in StartDistillation.model_fields if hasattr(arguments, name)}
        start = StartDistillation(**shared | {"student": arguments.student or self._student_of(cache)})
        student, inputs = self._cache_inputs(cache, start)
        made_by = self._inputs_of(cache)
        usual = made_by.eval_prompts if made_by else None
        if inputs.eval_prompts is None and usual is not None and self.references.allowed(usual.path):
            inputs = inputs.model_copy(update={"eval_prompts": usual})
        each = [start.model_copy(update={"overrides": {**start.overrides, **point}}) for point in points]
        return [self._of_cache(cache, student, inputs, fitted_to(one, student)[0]) for one in each]

    def benchmark(self, arguments: BenchmarkStudent) -> RunRequest:
        """A model and its baselines are measured on prompts, on those of a suite, or on a task of lm-eval."""
        arguments, suite, settings = with_suite(arguments)
        given = {"benchmark.samples_per_prompt": arguments.samples_per_prompt}
        overrides = {key: value for key, value in settings.items() if given.get(key) is None} | arguments.overrides
        recipe = self._recipe(arguments.preset, overrides, given)
        model = self.references.model(arguments.model)
        baselines = [self.references.model(reference) for reference in arguments.baselines]
        teacher = resolved_teacher(self.references, arguments.teacher) if arguments.teacher else None
        require_generating(model, *baselines)
        for other in (model, *baselines):
            if teacher is not None:
                differing_tokens(teacher, other)
        inputs = RunInputs(
            model=model.input,
            baselines=[baseline.input for baseline in baselines],
            teacher=teacher.input if teacher else None,
            prompts=None if arguments.prompts is None else self._prompts(arguments, [model, *baselines], recipe).input,
            suite=suite,
        )
        recipe = self._for_device(recipe, inputs, "benchmark", overrides)
        return self.request("benchmark", recipe, inputs, PhaseChain(recipe, inputs).benchmark().phases)

    def sample(self, arguments: SampleModel) -> RunRequest:
        """A model answers a few prompts."""
        recipe = usable_recipe("quick", {"runtime.seed": arguments.seed})
        sampling = Sampling(
            temperature=arguments.temperature, top_p=arguments.top_p, max_new_tokens=arguments.max_new_tokens
        )
        recipe = recipe.model_copy(update={"sample": SampleRecipe(sampling=sampling)})
        model = self.references.model(arguments.model)
        require_generating(model)
        inputs = RunInputs(model=model.input, prompts=self._prompts(arguments, [model], recipe).input)
        return self.request("sample", recipe, inputs, PhaseChain(recipe, inputs).sample().phases)

    def assess(self, arguments: AssessOverhead) -> RunRequest:
        """Two models are measured on a few prompts, by the recipe that a distillation would have.

        Raises ConsistencyError `tokenizer_mismatch`.
        """
        recipe = method_recipe(self._recipe(arguments.preset, arguments.overrides), "lightning")
        teacher, student = self.references.model(arguments.teacher), self.references.model(arguments.student)
        require_generating(student, teacher)
        differing = differing_tokens(teacher, student)
        prompts = self._prompts(arguments, [teacher, student], recipe, differing).input
        inputs = RunInputs(student=student.input, teacher=teacher.input, prompts=prompts)
        for phase in DRAWN_TO_ASSESS:
            recipe = self._for_device(recipe, inputs, phase, arguments.overrides)
        return self.request("assess", recipe, inputs, PhaseChain(recipe, inputs).assess().phases)

    def with_engines(self, recipe: Recipe) -> tuple[Recipe, list[Finding]]:
        """As `planning.engines.with_engines`, with what this workspace's settings say."""
        settings = read_settings(self.references.workspace).engines
        elsewhere = self.target if self.executor is not None else None
        return with_engines(recipe, settings, self.references.teacher_hosts, elsewhere)

    def _recipe(self, preset: Preset, overrides: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Recipe:
        return self.with_engines(usable_recipe(preset, overrides, given, self.target))[0]

    def request(self, kind: RunKind, recipe: Recipe, inputs: RunInputs, phases: list[RunPhase]) -> RunRequest:
        """The request, each phase with the artifact that already holds its result."""
        made = self.artifacts.made_by([phase.key for phase in phases])
        phases = with_satisfied(phases, made)
        return RunRequest(kind=kind, recipe=recipe, inputs=inputs, phases=phases, executor=self.executor)

    def _for_device(self, recipe: Recipe, inputs: RunInputs, phase: PhaseName, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe with a batch for this phase that the device holds, unless an override says it."""
        inspect = self.references.models.inspect_model
        return recipe_for_device(recipe, inputs, self.target(recipe.runtime), (phase,), overrides, inspect)

    def _prompts(
        self,
        arguments: GenerateTeacherResponses | BuildTeacherCache | BenchmarkStudent | SampleModel | AssessOverhead,
        models: Sequence[ResolvedModel],
        recipe: Recipe,
        differing: Sequence[TokenDifference] = (),
    ) -> ResolvedPrompts:
        """The prompts, looked at by the first model's tokenizer, which encodes them; raises as `TextWork.facts`.

        Raises ConsistencyError `tokenizer_mismatch` where they have one of the special tokens that differ, and as
        `require_positions`.
        """
        model, prompting = models[0], recipe.prompting
        columns = None if isinstance(arguments, SampleModel) else columns_of(arguments.columns, "prompts")
        assert arguments.prompts is not None, "a suite's are filled in, a task of lm-eval has none"
        prompts = self.references.prompts(arguments.prompts, columns)
        mean = prompts.scan.guessed_tokens()
        if model.facts is not None:
            watched = tuple(difference.id for difference in differing)
            asked = Asked(model.facts.path, prompting, prompts.scan, "all" if watched else None, watched=watched)
            facts = self.references.texts.facts(asked)
            judge_special_tokens(differing, facts, prompting, Findings())
            if (section := DRAWN_BY.get(type(arguments))) is not None:
                longest = min(facts.longest_prompt_tokens, prompting.max_prompt_tokens)
                drawn = f"{section}.sampling.max_new_tokens", getattr(recipe, section).sampling.max_new_tokens
                require_positions(longest, drawn, models)
            mean = facts.mean_prompt_tokens
        return replace(prompts, input=prompts.input.model_copy(update={"mean_prompt_tokens": mean}))

    def _require_fitting_tokens(
        self, teacher: ResolvedModel, student: ResolvedModel, responses: ResolvedResponses, recipe: Recipe
    ) -> None:
        """Raise ConsistencyError `tokenizer_mismatch` unless the tokens that the responses need are the same."""
        differing = differing_tokens(teacher, student)
        if not differing or teacher.facts is None or responses.header is None:
            return
        rows = responses.header.first
        watched = tuple(difference.id for difference in differing)
        scan = scan_of_rows([row.prompt for row in rows])
        asked = Asked(teacher.facts.path, recipe.prompting, scan, recipe.sft.train_turns, rows[0], watched)
        judge_special_tokens(differing, self.references.texts.facts(asked), recipe.prompting, Findings())

    def _teacher_of(self, cache: ResolvedCache, reference: str | Mapping[str, str] | None) -> ModelInput | None:
        """The cache's teacher: as given, or where the run that made the cache had it, if it is still the same."""
        if reference is not None:
            teacher = resolved_teacher(self.references, reference)
            named = cache.manifest.teacher.remote == "named"  # its weights were never seen
            identity = teacher.input.identity
            if identity and not named and not identity.same_model(cache.manifest.teacher):
                raise ConsistencyError(
                    "teacher_mismatch",
                    f"The teacher cache holds log-probs of {cache.manifest.teacher.label()}, "
                    f"but teacher is {identity.label()}.",
                    value=reference,
                    fix="Leave out teacher, or build a cache with this teacher.",
                )
            return teacher.input
        made_by = self._inputs_of(cache)
        known = made_by.teacher if made_by else None
        paths = {domain: member.path for domain, member in ((known and known.members) or {}).items()}
        found = [self.references.allowed(path) for path in (paths.values() or [known.path if known else None])]
        if any(path is None or not path.is_dir() for path in found):
            return None
        places = [str(path) for path in found]
        teacher = resolved_teacher(self.references, dict(zip(paths, places, strict=True)) if paths else places[0])
        same = teacher.input.identity and teacher.input.identity.same_model(cache.manifest.teacher)
        return teacher.input if same else None

    def _prompts_of(self, cache: ResolvedCache) -> DataInput | None:
        made_by = self._inputs_of(cache)
        prompts = made_by.prompts if made_by else None
        return prompts if prompts and self.references.allowed(prompts.path) else None

    def _cache_inputs(self, cache: ResolvedCache, arguments: StartDistillation) -> tuple[ResolvedModel, RunInputs]:
        """The student that a cache is for, and the inputs of its distillation."""
        seen = cache.manifest.teacher.context
        student = self.references.sft_student(str(arguments.student), arguments.declared_teacher, seen)
        allowed = arguments.allow_teacher_mismatch
        claim = cache_claim(cache.manifest, student.input.sft_teacher)
        require_consistent(cache.manifest.teacher, claim, allowed=allowed)
        teacher = self._teacher_of(cache, arguments.teacher)
        evaluation, prompts = (
            None if value is None else self.references.prompts(value, columns_of(arguments.columns, name)).input
            for name, value in (("eval_prompts", arguments.eval_prompts), ("prompts", arguments.prompts))
        )
        inputs = RunInputs(
            student=student.input,
            teacher=teacher,
            prompts=prompts or self._prompts_of(cache),
            eval_prompts=evaluation,
            cache=cache.input,
            declared_teacher=arguments.declared_teacher,
            allow_teacher_mismatch=allowed,
        )
        return student, inputs

    def _of_cache(
        self, cache: ResolvedCache, student: ResolvedModel, inputs: RunInputs, arguments: StartDistillation
    ) -> RunRequest:
        recipe, _ = self.with_engines(distillation_recipe(arguments))
        self.target(recipe.runtime)
        require_targets({"distill": recipe.distill}, student.facts)
        require_own_rollouts(cache.manifest, student, recipe)
        require_topk(cache, recipe)
        if recipe.distill.rounds > 1 and (inputs.teacher is None or inputs.prompts is None):
            raise ArgumentError(
                "invalid_argument",
                "A later round draws and scores rollouts anew: that takes the teacher and the prompts, which are not "
                "known of this cache.",
                value=f"distill.rounds={recipe.distill.rounds}",
                fix="Give teacher and prompts as well, or leave out distill.rounds.",
            )
        # Without answers and without the teacher at hand there is nothing to measure.
        measurable = inputs.eval_prompts is not None or (inputs.teacher is not None and inputs.prompts is not None)
        benchmark = arguments.benchmark and measurable
        recipe = self._for_device(recipe, inputs, "benchmark", arguments.overrides)
        phases = distillation_phases(recipe, inputs, "lightning", sft=False, benchmark=benchmark)
        return self.request("distill", recipe, inputs, phases)

    def _student_of(self, cache: ResolvedCache) -> str:
        """The student whose rollouts a cache of this workspace holds; raises ArgumentError `invalid_argument`."""
        artifact = self.artifacts.find(cache.input.artifact_id) if cache.input.artifact_id else None
        made_by = self._inputs_of(cache)
        if artifact is not None and artifact.record.run_id is not None and made_by is not None:
            fine_tuned = self.references.store.view(artifact.record.run_id).artifacts.get("sft")
            student = made_by.student
            if found := fine_tuned or (student and (student.artifact_id or student.path)):
                return found
        raise ArgumentError(
            "invalid_argument",
            "Which student's rollouts this cache holds is not known here: another workspace made it.",
            value=cache.input.reference,
            fix="Give student as well.",
        )

    def _inputs_of(self, cache: ResolvedCache) -> RunInputs | None:
        return self.references.inputs_of_artifact(cache.input.artifact_id) if cache.input.artifact_id else None


def require_topk(cache: ResolvedCache, recipe: Recipe) -> None:
    """Raise ArgumentError for a cache that holds fewer of the teacher's top tokens than the estimator trains on."""
    needed = recipe.distill.teacher_tokens
    if cache.manifest.topk < needed:
        raise ArgumentError(
            "invalid_argument",
            f"Estimator {recipe.distill.estimator} with entropy_share {recipe.distill.entropy_share:g} reads the "
            f"teacher's top {needed} tokens; the cache holds {cache.manifest.topk}.",
            value=cache.input.reference,
            fix=f"Build the cache with topk={needed}, or use estimator='sampled' on all tokens.",
        )


def model_label(model: ModelInput | None) -> str:
    """A model's short name: its artifact, else the last part of its Hub id or path."""
    if model is None:
        return "run"
    return model.artifact_id or (model.hub_id or model.path or model.reference).rstrip("/").rsplit("/", 1)[-1]
