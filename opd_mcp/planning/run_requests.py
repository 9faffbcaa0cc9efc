"""From the arguments of a start tool to a run's request: recipe, resolved inputs and keyed phases."""

from dataclasses import dataclass

from opd_mcp.devices.hardware import target_of
from opd_mcp.identity.consistency import require_behaviour, require_consistent
from opd_mcp.planning.checks import mean_prompt_tokens, require_matching_tokenizers
from opd_mcp.planning.phases import FindArtifact, PhaseChain, distillation_phases, with_satisfied
from opd_mcp.planning.references import References, ResolvedCache, ResolvedModel
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.plans import Plan
from opd_mcp.schemas.recipes import Method, Recipe, SampleRecipe, Sampling
from opd_mcp.schemas.requests import (
    BenchmarkStudent,
    BuildTeacherCache,
    GenerateTeacherResponses,
    PlanDistillation,
    SampleModel,
    StartDistillation,
    StartSft,
)
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs, RunKind, RunRequest


@dataclass(frozen=True)
class Composer:
    """Composes requests within one workspace; raises OpdError for anything that must not be started."""

    references: References
    find_artifact: FindArtifact

    def responses(self, arguments: GenerateTeacherResponses) -> RunRequest:
        """The teacher answers prompts."""
        recipe = checked_recipe(arguments.preset, arguments.overrides)
        teacher = self.references.model(arguments.teacher)
        inputs = RunInputs(teacher=teacher.input, prompts=self._prompts(arguments.prompts, teacher))
        return self._request("generate", recipe, inputs, PhaseChain(recipe, inputs).generate_responses())

    def sft(self, arguments: StartSft) -> RunRequest:
        """The student is fine-tuned on responses; whose they are is proven by lineage, else as declared."""
        recipe = checked_recipe(arguments.preset, arguments.overrides)
        student = self.references.model(arguments.student)
        responses = self.references.responses(arguments.responses, arguments.declared_teacher)
        inputs = RunInputs(student=student.input, responses=responses, declared_teacher=arguments.declared_teacher)
        return self._request("sft", recipe, inputs, PhaseChain(recipe, inputs).sft())

    def cache(self, arguments: BuildTeacherCache) -> RunRequest:
        """The SFT student's rollouts are drawn and scored.

        Raises ConsistencyError `teacher_mismatch`, `lineage_missing` or `tokenizer_mismatch`.
        """
        recipe = checked_recipe(arguments.preset, arguments.overrides)
        given = {name: getattr(arguments, name) for name in ("topk", "dtype", "on_truncated")}
        update = {name: value for name, value in given.items() if value is not None}
        recipe = recipe.model_copy(update={"score": recipe.score.model_copy(update=update)})
        if arguments.teacher_url is None:
            teacher = self.references.model(arguments.teacher)
        else:
            teacher = self.references.remote_teacher(arguments.teacher, arguments.teacher_url)
        student = self._sft_student(arguments.student, arguments.declared_teacher)
        require_matching_tokenizers(teacher, student)
        if teacher.input.identity is not None:
            allowed = arguments.allow_teacher_mismatch
            require_consistent(teacher.input.identity, student.input.sft_teacher, allowed=allowed)
        inputs = RunInputs(
            student=student.input,
            teacher=teacher.input,
            prompts=self._prompts(arguments.prompts, teacher if teacher.facts else student),
            declared_teacher=arguments.declared_teacher,
            sft_teacher_path=self.references.path_of_claim(student.input, teacher.input),
            allow_teacher_mismatch=arguments.allow_teacher_mismatch,
        )
        return self._request("cache", recipe, inputs, PhaseChain(recipe, inputs).cache_of_rollouts())

    def from_plan(self, plan: Plan, *, benchmark: bool) -> RunRequest:
        """What an unblocked plan stands for."""
        inputs, sft = plan.inputs, any(phase.name == "sft" for phase in plan.phases)
        chain = distillation_phases(plan.recipe, inputs, plan.method, sft=sft, benchmark=benchmark)
        request = self._request("sft" if plan.method == "sft" else "distill", plan.recipe, inputs, chain)
        return request.model_copy(update={"plan_id": plan.plan_id})

    def from_cache(self, arguments: StartDistillation) -> RunRequest:
        """The student is distilled from a cache of its own rollouts.

        Raises ConsistencyError `behaviour_mismatch`, `teacher_mismatch` or `lineage_missing`.
        """
        recipe = self._cache_recipe(arguments)
        cache = self.references.cache(str(arguments.cache_id))
        student = self._sft_student(str(arguments.student), arguments.declared_teacher)
        allowed = arguments.allow_teacher_mismatch
        if student.input.identity is not None:
            require_behaviour(cache.manifest.behaviour, student.input.identity)
        require_consistent(cache.manifest.teacher, student.input.sft_teacher, allowed=allowed)
        require_topk(cache, recipe)
        teacher = self._teacher_of(cache, arguments.teacher)
        evaluation = None if arguments.eval_prompts is None else self.references.prompts(arguments.eval_prompts).input
        prompts = None if arguments.prompts is None else self.references.prompts(arguments.prompts).input
        inputs = RunInputs(
            student=student.input,
            teacher=teacher,
            prompts=prompts or self._prompts_of(cache),
            eval_prompts=evaluation,
            cache=cache.input,
            declared_teacher=arguments.declared_teacher,
            allow_teacher_mismatch=allowed,
        )
        # Without answers and without the teacher at hand there is nothing to measure.
        measurable = evaluation is not None or (teacher is not None and inputs.prompts is not None)
        benchmark = arguments.benchmark and measurable
        chain = distillation_phases(recipe, inputs, "lightning", sft=False, benchmark=benchmark)
        return self._request("distill", recipe, inputs, chain)

    def benchmark(self, arguments: BenchmarkStudent) -> RunRequest:
        """A model and its baselines are measured on prompts."""
        recipe = checked_recipe(arguments.preset, arguments.overrides)
        if arguments.samples_per_prompt is not None:
            section = recipe.benchmark.model_copy(update={"samples_per_prompt": arguments.samples_per_prompt})
            recipe = recipe.model_copy(update={"benchmark": section})
        model = self.references.model(arguments.model)
        baselines = [self.references.model(reference) for reference in arguments.baselines]
        teacher = self.references.model(arguments.teacher) if arguments.teacher else None
        for other in (model, *baselines):
            if teacher is not None:
                require_matching_tokenizers(teacher, other)
        inputs = RunInputs(
            model=model.input,
            baselines=[baseline.input for baseline in baselines],
            teacher=teacher.input if teacher else None,
            prompts=self._prompts(arguments.prompts, model),
        )
        return self._request("benchmark", recipe, inputs, PhaseChain(recipe, inputs).benchmark())

    def sample(self, arguments: SampleModel) -> RunRequest:
        """A model answers a few prompts."""
        recipe = checked_recipe("quick", {"runtime.seed": arguments.seed})
        sampling = Sampling(
            temperature=arguments.temperature, top_p=arguments.top_p, max_new_tokens=arguments.max_new_tokens
        )
        recipe = recipe.model_copy(update={"sample": SampleRecipe(sampling=sampling)})
        model = self.references.model(arguments.model)
        inputs = RunInputs(model=model.input, prompts=self._prompts(arguments.prompts, model))
        return self._request("sample", recipe, inputs, PhaseChain(recipe, inputs).sample())

    def _request(self, kind: RunKind, recipe: Recipe, inputs: RunInputs, chain: PhaseChain) -> RunRequest:
        phases = with_satisfied(chain.phases, recipe.distill.method, self.find_artifact)
        return RunRequest(kind=kind, recipe=recipe, inputs=inputs, phases=phases)

    def _prompts(self, value: str | list[str], model: ResolvedModel) -> DataInput:
        prompts = self.references.prompts(value)
        mean = mean_prompt_tokens(model.facts.path, prompts.rows) if model.facts else None
        return prompts.input.model_copy(update={"mean_prompt_tokens": mean})

    def _sft_student(self, reference: str, declared_teacher: str | None) -> ResolvedModel:
        student = self.references.model(reference)
        if student.input.sft_teacher is not None or declared_teacher is None:
            return student
        claim = self.references.claim(declared_teacher)
        return ResolvedModel(student.input.model_copy(update={"sft_teacher": claim}), student.facts)

    def _cache_recipe(self, arguments: StartDistillation) -> Recipe:
        if arguments.method != "lightning":
            raise ArgumentError(
                "invalid_argument",
                "A teacher cache is for the method 'lightning'.",
                value=arguments.method,
                fix="Leave out method, or leave out cache_id and give teacher and prompts.",
            )
        recipe = checked_recipe(arguments.preset, arguments.overrides)
        distill = recipe.distill.model_copy(update={"estimator": arguments.estimator})
        return method_recipe(recipe.model_copy(update={"distill": distill}), "lightning")

    def _teacher_of(self, cache: ResolvedCache, reference: str | None) -> ModelInput | None:
        """The cache's teacher: as given, or where the run that made the cache had it, if it is still the same."""
        if reference is not None:
            teacher = self.references.model(reference)
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
        path = self.references.allowed(made_by.teacher.path if made_by and made_by.teacher else None)
        if path is None or not path.is_dir():
            return None
        teacher = self.references.model(str(path))
        same = teacher.input.identity and teacher.input.identity.same_model(cache.manifest.teacher)
        return teacher.input if same else None

    def _prompts_of(self, cache: ResolvedCache) -> DataInput | None:
        made_by = self._inputs_of(cache)
        prompts = made_by.prompts if made_by else None
        return prompts if prompts and self.references.allowed(prompts.path) else None

    def _inputs_of(self, cache: ResolvedCache) -> RunInputs | None:
        return self.references.inputs_of_artifact(cache.input.artifact_id) if cache.input.artifact_id else None


def checked_recipe(preset: str, overrides: dict[str, object]) -> Recipe:
    """The resolved recipe, for a device that is there; raises ArgumentError, or ResourceError `device_unavailable`."""
    recipe = resolve_recipe(preset, overrides)  # type: ignore[arg-type]
    target_of(recipe.runtime)
    return recipe


def require_topk(cache: ResolvedCache, recipe: Recipe) -> None:
    """Raise ArgumentError for a cache that holds fewer of the teacher's top tokens than the estimator trains on."""
    needed = recipe.distill.topk if recipe.distill.estimator != "sampled" else 0
    if cache.manifest.topk < needed:
        raise ArgumentError(
            "invalid_argument",
            f"Estimator {recipe.distill.estimator} trains on the teacher's top {needed} tokens; the cache holds "
            f"{cache.manifest.topk}.",
            value=cache.input.reference,
            fix=f"Build the cache with topk={needed}, or use estimator='sampled'.",
        )


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
    if method == "lightning" and distill.estimator != "sampled" and recipe.score.topk < distill.topk:
        update["score"] = recipe.score.model_copy(update={"topk": distill.topk})
    return recipe.model_copy(update=update)
