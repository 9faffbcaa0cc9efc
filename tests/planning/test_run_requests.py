"""The start tools besides plans: caches, distillation from a cache, SFT, benchmarks."""

import pytest

from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.requests import BenchmarkStudent, GenerateTeacherResponses, StartDistillation, StartSft, Sweep


@pytest.fixture
def cached(world, service, sft_student, finished):
    """(student, cache_id) of a finished teacher cache."""
    student = sft_student(world.teacher)
    cache = service.build_teacher_cache(world.cache_arguments(student))
    status = finished(service, cache.run_id)
    assert status.state == "succeeded", status
    assert status.result["artifacts"]["cache"] == cache.cache_id
    return student, cache.cache_id


def from_cache(student: str | None, cache_id: str, **changes: object) -> StartDistillation:
    defaults = {"preset": "demo", "overrides": {"distill.steps": 2}}
    return StartDistillation(**{"student": student, "cache_id": cache_id, **defaults, **changes})


def test_a_cache_for_a_student_without_lineage_needs_a_declared_teacher(world, service, finished):
    with pytest.raises(ConsistencyError, match=r"lineage_missing.*declared_teacher"):
        service.build_teacher_cache(world.cache_arguments(world.student))
    assert service.list_runs().total == 0
    declared = service.build_teacher_cache(world.cache_arguments(world.student, declared_teacher=world.teacher))
    assert finished(service, declared.run_id).state == "succeeded"
    with pytest.raises(ConsistencyError, match="lineage_missing"):
        service.start_distillation(from_cache(world.student, declared.cache_id))
    run = service.start_distillation(from_cache(world.student, declared.cache_id, declared_teacher=world.teacher))
    assert finished(service, run.run_id).state == "succeeded"


def test_a_cache_of_another_teacher_is_refused_unless_allowed(world, service, sft_student, finished):
    student = sft_student(world.other_teacher)
    with pytest.raises(ConsistencyError, match=r"teacher_mismatch.*teacher_other_style@.*teacher@"):
        service.build_teacher_cache(world.cache_arguments(student))
    allowed = service.build_teacher_cache(world.cache_arguments(student, allow_teacher_mismatch=True))
    assert finished(service, allowed.run_id).state == "succeeded"
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        service.start_distillation(from_cache(student, allowed.cache_id))
    run = service.start_distillation(from_cache(student, allowed.cache_id, allow_teacher_mismatch=True))
    assert finished(service, run.run_id).state == "succeeded"


def test_rollouts_of_another_policy_are_refused_with_both_identities(world, service, cached):
    _, cache_id = cached
    with pytest.raises(ConsistencyError, match=r"behaviour_mismatch.*rollouts of .*@.*is student@"):
        service.start_distillation(from_cache(world.student, cache_id, declared_teacher=world.teacher))


def test_a_cache_finds_its_teacher_and_prompts_for_the_report(world, service, cached, finished):
    student, cache_id = cached
    status = finished(service, service.start_distillation(from_cache(student, cache_id)).run_id)
    assert status.phases_done == ["distill", "benchmark"]
    assert "greedy_accuracy" not in status.result["scores"]["distilled"]
    bare = service.start_distillation(from_cache(student, cache_id, benchmark=False))
    status = finished(service, bare.run_id)
    assert status.phases_done == ["distill"]
    assert (status.next_action.tool, status.next_action.arguments["model"]) == ("benchmark_student", bare.run_id)


def test_what_does_not_go_with_a_cache_is_refused(world, service, cached):
    student, cache_id = cached
    wrong = {
        "method": ({"method": "live"}, "is for the method 'lightning'"),
        "sft_prompts": ({"sft_prompts": ["1+1=?"]}, "sft_prompts have no use"),
        "topk": ({"estimator": "topk_reverse_kl", "overrides": {"distill.topk": 9}}, "Build the cache with topk=9"),
    }
    for changes, message in wrong.values():
        with pytest.raises(ArgumentError, match=message):
            service.start_distillation(from_cache(student, cache_id, **changes))
    with pytest.raises(ArgumentError, match="cache_id needs a student"):
        service.start_distillation(from_cache(None, cache_id))
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        service.start_distillation(from_cache(student, cache_id, teacher=world.other_teacher))


def test_the_cache_id_is_the_same_for_the_same_cache(world, service, busy_machine):
    first = service.build_teacher_cache(world.cache_arguments(world.student, declared_teacher="teacher"))
    again = service.build_teacher_cache(world.cache_arguments(world.student, declared_teacher="teacher"))
    other = service.build_teacher_cache(world.cache_arguments(world.student, declared_teacher="teacher", topk=4))
    assert (first.run_id, first.cache_id, again.reused) == (again.run_id, again.cache_id, True)
    assert other.cache_id != first.cache_id
    for run in (first, other):
        service.cancel(run.run_id)


def test_an_sft_student_of_declared_responses_carries_the_assertion(world, service, finished):
    responses = world.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n')
    run = service.start_sft(
        StartSft(
            student=world.student,
            responses=responses,
            declared_teacher=world.teacher,
            preset="demo",
            overrides={"sft.steps": 1},
        )
    )
    assert run.run_id.startswith("sft-student-")
    status = finished(service, run.run_id)
    assert (status.next_action.tool, status.next_action.missing) == ("build_teacher_cache", ["prompts"])
    assert status.next_action.arguments["teacher"] == world.teacher
    plan = service.plan(world.plan_arguments(student=run.run_id))
    assert plan.consistency.basis == "asserted"


def test_sft_adopts_the_template_of_a_declared_teacher_that_is_here(world, service, busy_machine):
    responses = world.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n')
    given = {"student": world.student, "responses": responses, "preset": "demo"}
    teacher = world.copy_of(world.teacher, "declared")
    runs = [service.start_sft(StartSft(**given, declared_teacher=str(teacher)))]
    (teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<assistant>")
    runs += [service.start_sft(StartSft(**given, declared_teacher=name)) for name in (str(teacher), "a name")]
    inputs = [service.store.record(run.run_id).request.inputs for run in runs]
    assert [given.teacher.path if given.teacher else None for given in inputs] == [str(teacher), str(teacher), None]
    assert len({run.run_id for run in runs}) == 3, "another template is another SFT student"
    for run in runs:
        service.cancel(run.run_id)


def test_sft_refuses_a_declared_teacher_with_other_tokens(world, service):
    teacher = world.copy_of(world.teacher, "other-tokens")
    content = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(content.replace('"7"', '"@"'))
    responses = world.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n')
    arguments = StartSft(student=world.student, responses=responses, preset="demo", declared_teacher=str(teacher))
    with pytest.raises(ConsistencyError, match="tokenizer_mismatch"):
        service.start_sft(arguments)


def test_responses_know_what_to_do_with_them(world, service, finished):
    run = service.generate_teacher_responses(
        GenerateTeacherResponses(teacher=world.teacher, prompts=["1+1=?"], preset="demo")
    )
    assert run.run_id.startswith("generate-teacher-")
    step = finished(service, run.run_id).next_action
    assert step.call_text() == f"Call start_sft(student='…', responses='{run.run_id}')"


def test_a_benchmark_names_its_models_and_keeps_their_names_apart(world, service, finished):
    (world.root / "data" / "sub").mkdir()
    copy = world.copy_of(world.student, "sub/student")
    run = service.benchmark_student(
        BenchmarkStudent(
            model=world.student,
            baselines=[str(copy), world.teacher],
            prompts=world.prompts(),
            teacher=world.teacher,
            samples_per_prompt=2,
            preset="demo",
        )
    )
    status = finished(service, run.run_id)
    assert list(status.result["scores"]) == ["student", "student-2", "teacher"]
    assert service.store.record(run.run_id).request.recipe.benchmark.samples_per_prompt == 2


@pytest.mark.parametrize("given", [{}, {"student": "/x"}, {"student": "/x", "teacher": "/y"}])
def test_a_start_with_too_little_says_what_is_missing(service, given):
    with pytest.raises(ArgumentError, match=r"Missing: .*prompts.*plan_id"):
        service.start_distillation(StartDistillation(**given))


CONTRADICTIONS = [
    ({"distill.estimator": "topk_reverse_kl"}, "distill.estimator", "estimator='sampled'"),
    ({"distill.method": "live"}, "distill.method", "method='lightning'"),
]


@pytest.mark.parametrize(("overrides", "key", "argument"), CONTRADICTIONS)
def test_an_override_that_contradicts_an_argument_is_one_error_that_names_both(
    world, service, cached, overrides, key, argument
):
    """From a cache as from a plan's arguments: neither silently wins."""
    student, cache_id = cached
    for arguments in (from_cache(student, cache_id, overrides=overrides), world.start_arguments(overrides=overrides)):
        with pytest.raises(ArgumentError, match=rf"invalid_argument.*{key}.*contradicts.*{argument}"):
            service.start_distillation(arguments)


@pytest.mark.parametrize(
    ("name", "given", "overridden"),
    [("topk", 4, 16), ("dtype", "float32", "float16"), ("on_truncated", "keep", "drop")],
)
def test_a_caches_arguments_and_overrides_agree_or_are_refused(world, service, sft_student, name, given, overridden):
    student, key = sft_student(world.teacher), f"score.{name}"
    with pytest.raises(ArgumentError, match=f"{key}=.*{overridden}.*contradicts.*{name}=.*{given}"):
        service.build_teacher_cache(world.cache_arguments(student, **{name: given}, overrides={key: overridden}))
    run = service.build_teacher_cache(world.cache_arguments(student, **{name: given}, overrides={key: given}))
    assert service.store.record(run.run_id).request.recipe.score.to_dict()[name] == given
    service.cancel(run.run_id)


def test_samples_per_prompt_and_its_override_agree_or_are_refused(world, service, finished):
    given = {"model": world.student, "prompts": world.prompts(), "preset": "demo", "samples_per_prompt": 2}
    with pytest.raises(ArgumentError, match=r"benchmark.samples_per_prompt=8 contradicts.*samples_per_prompt=2"):
        service.benchmark_student(BenchmarkStudent(**given, overrides={"benchmark.samples_per_prompt": 8}))
    run = service.benchmark_student(BenchmarkStudent(**given))
    assert service.store.record(run.run_id).request.recipe.benchmark.samples_per_prompt == 2
    service.cancel(run.run_id)


def test_a_cache_that_is_too_small_for_the_estimator_by_an_override_is_refused(world, service):
    changes = {"estimator": "topk_reverse_kl", "overrides": {"score.topk": 4, "distill.topk": 8}}
    with pytest.raises(ArgumentError, match=r"score.topk=4 contradicts distill.topk=8"):
        service.plan(world.plan_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "live"}, "live distillation has none"), ({"estimator": "topk_reverse_kl"}, "needs the estimator")],
)
def test_a_repair_without_cached_scores_of_sampled_tokens_is_refused(world, service, changes, message):
    with pytest.raises(ArgumentError, match=message):
        service.plan(world.plan_arguments(**changes, overrides={"distill.repair": "residual"}))


def test_several_teachers_are_measured_against_and_must_be_those_of_a_swept_cache(world, service, cached):
    student, cache_id = cached
    teachers = {"plain": world.teacher, "styled": world.other_teacher}
    prompts = world.prompts("divided", teacher_domain="styled")
    run = service.benchmark_student(
        BenchmarkStudent(model=world.student, prompts=prompts, teacher=teachers, preset="demo")
    )
    assert service.store.record(run.run_id).request.inputs.teacher.members.keys() == teachers.keys()
    swept = Sweep(cache_id=cache_id, student=student, grid={"distill.advantage_clip": [1, 5]}, teacher=teachers)
    with pytest.raises(ConsistencyError, match=r"teacher_mismatch.*but teacher is plain: teacher@"):
        service.sweep(swept)
