"""Models that cannot generate here are refused by their model_type, before anything starts."""

import json
from pathlib import Path

import pytest

from opd_mcp.identity.models import UNDECODABLE
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.requests import BenchmarkStudent, GenerateTeacherResponses, SampleModel

REFUSED = r"unsupported_model.*cannot generate here.*docs/data.md lists"


def retyped(world, model: str, model_type: str) -> str:
    """A copy of a model whose config.json names another class."""
    directory = world.copy_of(model, f"{Path(model).name}-{model_type}")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    return str(directory)


@pytest.mark.parametrize("model_type", UNDECODABLE)
def test_a_plan_names_the_class_that_cannot_generate(world, service, model_type):
    with pytest.raises(PathError, match=REFUSED) as caught:
        service.plan(world.plan_arguments(student=retyped(world, world.student, model_type)))
    assert f"{model_type!r}" in caught.value.message
    assert UNDECODABLE[model_type] in caught.value.message


def test_so_does_every_start_that_would_generate(world, service):
    student, teacher = retyped(world, world.student, "rwkv"), retyped(world, world.teacher, "rwkv")
    prompts = world.prompts()
    with pytest.raises(PathError, match=REFUSED):
        service.plan(world.plan_arguments(teacher=teacher))
    with pytest.raises(PathError, match=REFUSED):
        service.generate_teacher_responses(GenerateTeacherResponses(teacher=teacher, prompts=prompts))
    with pytest.raises(PathError, match=REFUSED):
        service.build_teacher_cache(world.cache_arguments(student, declared_teacher="teacher"))
    with pytest.raises(PathError, match=REFUSED):
        service.benchmark_student(BenchmarkStudent(model=student, prompts=prompts))
    with pytest.raises(PathError, match=REFUSED):
        service.sample_model(SampleModel(model=student, prompts=["1+1=?"]))
    assert service.list_runs().rows == []
