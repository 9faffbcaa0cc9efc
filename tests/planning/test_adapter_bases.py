"""Adapters in a plan: the base of one that is a model reference is found, below the allowed roots alone, and the layers
of one that is to be trained are those of the student.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opd_mcp.identity.adapters import BASE_IDENTITY, read_adapter
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.planning.adapter_bases import target_problems
from opd_mcp.schemas.errors import ArgumentError, PathError
from opd_mcp.schemas.resolve import resolve_recipe


@pytest.fixture
def references(service):
    return service._references


@pytest.fixture
def adapter(world):
    """`adapter(name, base, known=…)`: a directory as peft writes it, without a tokenizer, for the world's student."""

    def make(name: str, base: object = world.student, *, known: bool = True) -> Path:
        directory = world.root / "data" / name
        directory.mkdir()
        with safe_open(Path(world.student) / "model.safetensors", "pt") as weights:
            layers = [key for key in weights.keys() if key.endswith("q_proj.weight")]  # noqa: SIM118
            shapes = {key.removesuffix(".weight"): weights.get_slice(key).get_shape() for key in layers}
        tensors = {}
        for layer, (out, into) in shapes.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.ones(2, into)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(out, 2) / 100
        identity = inspect_model(Path(world.student)).identity
        save_file(
            tensors, directory / "adapter_model.safetensors", {BASE_IDENTITY: identity.to_json()} if known else None
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), "bias": "none"}
        (directory / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
        return directory

    return make


UNKNOWN = {"distill.adapter": {"targets": ["q_proj", "query", "o_projj"]}}


def test_layers_that_the_student_does_not_have_block_the_plan_by_name(service, world):
    plan = service.plan(world.plan_arguments(overrides=UNKNOWN | {"sft.adapter.targets": ["up_proj"]}))
    [finding] = plan.blocking
    assert finding.code == "invalid_argument"
    assert "is called o_projj, query" in finding.message
    assert "'down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj'" in finding.fix
    both = service.plan(world.plan_arguments(overrides=UNKNOWN | {"sft.adapter": {"targets": ["lm_head"]}}))
    assert ["lm_head" in finding.message for finding in both.blocking] == [True, False]
    known = {"distill.adapter.targets": ["q_proj", "down_proj"]}
    assert not service.plan(world.plan_arguments(overrides=known)).blocking
    # a student that has had its SFT is not fine-tuned, so that section's targets are not asked for
    declared = {"declared_teacher": world.teacher, "overrides": {"sft.adapter": {"targets": ["query"]}}}
    assert not service.plan(world.plan_arguments(**declared)).blocking


def test_a_fine_tuning_of_unknown_layers_is_refused_before_it_starts(service, world):
    with pytest.raises(ArgumentError, match=r"invalid_argument.*called query"):
        service.start_sft(world.sft_arguments(**{"sft.adapter": {"targets": ["query"]}}))
    assert service.list_runs().total == 0


def test_of_a_model_with_experts_the_files_do_not_say_the_layers_names(world):
    facts = inspect_model(Path(world.student))
    sections = {"distill": resolve_recipe("demo", UNKNOWN).distill}
    assert len(list(target_problems(sections, facts))) == 1
    assert not list(target_problems(sections, replace(facts, config=facts.config | {"num_experts": 8})))
    assert not list(target_problems(sections, None)), "still to be fetched"
    assert not list(target_problems({"distill": resolve_recipe("demo", {}).distill}, facts))


def test_an_adapter_without_tokenizer_gets_its_base_s(references, world, adapter):
    directory = adapter("plain", known=False)
    model = references.model(str(directory))
    assert model.input.artifact_id.startswith("model-adapter-")
    assert model.facts.adapter.base == world.student
    assert model.input.identity.tokenizer == inspect_model(Path(world.student)).identity.tokenizer
    assert model.facts.eos_token_ids == inspect_model(Path(world.student)).eos_token_ids
    assert references.model(str(directory)).input == model.input, "found again, not made again"
    assert read_lineage(Path(model.input.path)).parents[0].role == "base"


def test_a_complete_adapter_is_used_where_it_lies(references, world, adapter):
    directory = adapter("complete")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(world.student) / name).is_file():
            shutil.copyfile(Path(world.student) / name, directory / name)
    model = references.model(str(directory)).input
    assert (model.path, model.artifact_id) == (str(directory), None)
    assert model.identity.weights != inspect_model(Path(world.student)).identity.weights


@pytest.mark.parametrize("base", ["/moved/away", "org/name", "somewhere"])
def test_a_base_that_has_moved_is_found_by_its_identity(references, service, world, adapter, sft_student, base):
    """Among the workspace's models; an adapter that does not know its base's identity is refused."""
    sft_student(world.teacher)
    copy = service.store.artifacts.new_building_directory("model")
    shutil.copytree(world.student, copy, dirs_exist_ok=True)
    kept = service.store.artifacts.publish("model", copy, artifact_id="model-kept", key="kept")
    model = references.model(str(adapter("moved", base)))
    assert read_adapter(Path(model.input.path)).base == str(kept.path)
    with pytest.raises(PathError, match=r"base_missing|outside_roots"):
        references.model(str(adapter("unknown", base, known=False)))


def test_another_model_where_the_base_was_is_not_the_base(references, world, adapter):
    with pytest.raises(PathError, match="base_missing"):
        references.model(str(adapter("replaced", world.other_teacher)))


def test_a_base_outside_the_roots_is_not_opened(references, world, adapter, monkeypatch):
    outside = world.root / "outside"
    shutil.copytree(world.student, outside)
    (outside / "config.json").write_text("must not be read")
    with pytest.raises(PathError, match="outside_roots"):
        references.model(str(adapter("leading-out", outside, known=False)))


def test_a_run_on_an_adapter_is_planned_with_base_and_adapter(service, world, adapter):
    plan = service.plan(world.plan_arguments(student=str(adapter("student"))))
    assert not plan.blocking
    assert plan.inputs.student.parameters > inspect_model(Path(world.student)).parameters
    teacher = service.plan(world.plan_arguments(teacher=str(adapter("teacher"))))
    assert not teacher.blocking


@pytest.mark.parametrize(
    ("sft", "distill", "message"),
    [
        (None, {"continue_adapter": True}, "ends with a whole model"),
        ({"save": "merged"}, {"continue_adapter": True}, "ends with a whole model"),
        ({"rank": 4, "save": "adapter"}, {"rank": 8, "continue_adapter": True}, "rank 4 and scale 2 .* rank 8"),
        ({"rank": 4, "save": "both"}, {"rank": 4, "continue_adapter": True}, None),
        ({}, {}, None),
    ],
)
def test_an_adapter_that_the_sft_does_not_leave_blocks_before_any_work(world, service, sft, distill, message):
    overrides = {"distill.adapter": distill} | ({} if sft is None else {"sft.adapter": sft})
    plan = service.plan(world.plan_arguments(overrides=overrides))
    texts = [f"{finding.message} {finding.fix}" for finding in plan.blocking if "adapter" in finding.message]
    assert len(texts) == (message is not None)
    assert message is None or re.search(message, texts[0])
