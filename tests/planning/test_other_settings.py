"""A copy of a model with other settings is another model: other results, another teacher, other runs."""

import json

import pytest

from opd_mcp.schemas.errors import ConsistencyError, IntegrityError
from opd_mcp.schemas.requests import SampleModel
from opd_mcp.worker.fetch import present_model

CHANGES = [
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rms_norm_eps": 0.1},
    {"hidden_act": "gelu"},
]
NAMES = ["rope_theta", "norm_epsilon", "activation"]


def changed_copy(world, model: str, name: str, change: dict) -> str:
    """A copy of a model directory whose config.json has other values."""
    copy = world.copy_of(model, name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    return str(copy)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_its_responses_and_caches_have_other_ids(world, service, change):
    other = changed_copy(world, world.teacher, "other", change)
    same = changed_copy(world, world.teacher, "same", {"torch_dtype": "float32", "transformers_version": "4.0.0"})
    keys = {}
    for teacher in (world.teacher, other, same):
        plan = service.plan(world.plan_arguments(teacher=teacher))
        keys[teacher] = {phase.name: phase.key for phase in plan.phases}
    assert keys[same] == keys[world.teacher]
    assert not set(keys[other].values()) & set(keys[world.teacher].values())


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_it_is_refused_as_the_sft_teacher(world, service, sft_student, change):
    other = changed_copy(world, world.teacher, "other", change)
    student = sft_student(world.teacher)
    plan = service.plan(world.plan_arguments(student=student, teacher=other))
    assert [finding.code for finding in plan.blocking] == ["teacher_mismatch"]
    assert not service.plan(world.plan_arguments(student=student)).blocking
    with pytest.raises(ConsistencyError) as caught:
        service.build_teacher_cache(world.cache_arguments(student, teacher=other))
    assert caught.value.code == "teacher_mismatch"


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_its_samples_are_not_those_of_another_models_active_run(world, service, busy_machine, change):
    other = changed_copy(world, world.teacher, "other", change)
    first, second, again = (
        service.sample_model(SampleModel(model=model, prompts=["1+1=?"])) for model in (world.teacher, other, other)
    )
    assert (first.reused, second.reused, again.reused) == (False, False, True)
    assert second.run_id == again.run_id != first.run_id
    for run in (first, second):
        service.cancel(run.run_id)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("config.json", {"rms_norm_eps": 0.1}), "configuration"),
        (("generation_config.json", {"eos_token_id": [1, 5]}), "special_tokens"),
        (("tokenizer_config.json", {"clean_up_tokenization_spaces": True}), "encoding"),
    ],
)
def test_a_model_that_changed_since_its_run_was_asked_for_ends_the_run(world, service, changed, named):
    file, change = changed
    model = world.copy_of(world.teacher, "changing")
    asked = service._references.model(str(model)).input
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, **change}))
    with pytest.raises(IntegrityError, match=f"changed: {named}") as caught:
        present_model(service.store, asked, lambda: None)
    assert caught.value.code == "input_changed"


def test_what_a_teachers_directory_holds_and_is_not_used_is_said_in_the_plan(world, service):
    teacher = world.copy_of(world.teacher, "odd")
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates" / "rag.jinja").write_text("other")
    plan = service.plan(world.plan_arguments(teacher=str(teacher)))
    finding = next(finding for finding in plan.warnings if finding.code == "files_unused")
    assert "additional_chat_templates" in finding.message
    clean = service.plan(world.plan_arguments())
    assert "files_unused" not in {finding.code for finding in clean.warnings}
