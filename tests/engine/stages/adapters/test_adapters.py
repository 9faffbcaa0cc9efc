"""Students trained with an adapter, through all stages: what is saved, what π_ref is, and who goes on from it."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opd_mcp.engine import stages
from opd_mcp.engine.cache.shards import read_shard
from opd_mcp.engine.context import (
    BenchmarkInputs,
    Context,
    DistillInputs,
    ResponsesInputs,
    SampleInputs,
    SftInputs,
)
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.models.lora import without_adapters
from opd_mcp.engine.provenance import trained_adapter
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.engine.scoring.local import base_as_teacher, score_sequences
from opd_mcp.identity.adapters import read_adapter
from opd_mcp.identity.lineage import read_lineage, verified_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.recipes import AdapterRecipe, CheckpointRecipe
from tests.engine.stages.adapters.conftest import Pipeline, logits
from tests.engine.stages.conftest import Alerts


def test_a_float32_run_saves_the_student_merged(pipeline: Pipeline, merged: Path) -> None:
    base = load_file(pipeline.example / "student" / "model.safetensors")
    found = load_file(merged / "model.safetensors")
    assert found.keys() == base.keys()
    moved = {name for name in base if not torch.equal(base[name], found[name])}
    assert moved == {name for name in base if name.endswith("_proj.weight")}
    lineage = verified_lineage(merged, full=True)
    assert lineage is not None
    assert lineage.adapter is not None
    assert (lineage.adapter.start, lineage.adapter.saved, lineage.adapter.rank) == ("zero", "merged", 4)
    assert lineage.adapter.base == inspect_model(pipeline.example / "student").identity
    assert lineage.recipe["sft"]["adapter"]["rank"] == 4


def test_an_adapter_alone_is_the_same_student(merged: Path, kept: Path) -> None:
    """Two trainings of the same recipe, saved in two ways; files in peft's format prove themselves."""
    assert sorted(file.name for file in kept.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert not (kept / "config.json").exists()
    assert (kept / "chat_template.jinja").is_file() or (kept / "tokenizer_config.json").is_file()
    assert (logits(kept) - logits(merged)).abs().max() <= 1e-5
    assert verified_lineage(kept, full=True) is not None
    summary = json.loads((kept / "training.json").read_text())
    assert summary["trained_parameters"] == read_adapter(kept).parameters
    assert summary["parameters"] == inspect_model(kept).parameters


def test_both_ways_lie_in_one_directory(pipeline: Pipeline, merged: Path, kept: Path) -> None:
    both = pipeline.sft("both", save="both")
    assert load_file(both / "model.safetensors").keys() == load_file(merged / "model.safetensors").keys()
    ours, alone = (load_file(path / "adapter_model.safetensors") for path in (both / "adapter", kept))
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
    assert inspect_model(both / "adapter").identity.weights == inspect_model(kept).identity.weights
    lineage = verified_lineage(both)
    assert lineage is not None
    assert "adapter/adapter_model.safetensors" in lineage.files


def test_a_distillation_starts_at_zero_on_the_adapted_student(pipeline: Pipeline, kept: Path, cache: Path) -> None:
    """Its first step computes what the behaviour policy computed: π_ref is the student as it was given."""
    student = pipeline.distill(kept, cache, "zero", save="adapter")
    lineage = read_lineage(student)
    assert lineage is not None
    assert lineage.adapter is not None
    assert lineage.adapter.start == "zero"
    assert lineage.adapter.base == inspect_model(pipeline.example / "student").identity
    assert read_adapter(student).rank == 4 + 4, "what the student had, and what was learnt, on the first base"
    one = pipeline.recipe.distill.model_copy(update={"steps": 1, "adapter": AdapterRecipe(rank=4)})
    stages.distill(one, DistillInputs(student=kept, cache=cache), pipeline.root / "one", pipeline.context)
    first = json.loads((pipeline.root / "one" / "training.json").read_text())["final"]
    assert first["drift_mean"] == pytest.approx(1.0, abs=1e-4)


def test_several_adapters_are_trained_on_one_loaded_base_as_each_would_be_alone(
    pipeline: Pipeline, kept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, of other ranks, layers and rates; on a student that is an adapter itself."""
    module, loaded = sys.modules[stages.distill.__module__], []
    load = module.load_model

    def noting(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args[0])
        return load(*args, **kwargs)

    section, saved = pipeline.recipe.distill, {"save": "adapter"}
    sections = [
        section.model_copy(update={"adapter": AdapterRecipe(rank=4, **saved)}),
        section.model_copy(update={"adapter": AdapterRecipe(rank=2, targets=["q_proj"], scaling="rslora", **saved)}),
        section.model_copy(update={"adapter": AdapterRecipe(rank=4, **saved), "advantage_clip": 0.5, "steps": 2}),
    ]
    inputs = DistillInputs(student=kept, cache=cache)
    outputs = [pipeline.root / f"several-{number}" for number in range(3)]
    context = replace(pipeline.context, checkpoints=pipeline.root / "several", checkpoint=CheckpointRecipe(steps=1))
    monkeypatch.setattr(module, "load_model", noting)
    summaries = stages.distill_adapters(sections, inputs, outputs, context)
    assert loaded == [kept]
    assert [summary.steps for summary in summaries] == [3, 3, 2]
    monkeypatch.undo()
    for number, each in enumerate(sections):
        alone = pipeline.root / f"alone-{number}"
        stages.distill(each, inputs, alone, pipeline.context)
        expected, made = (load_file(path / "adapter_model.safetensors") for path in (alone, outputs[number]))
        assert expected.keys() == made.keys()
        assert all(torch.equal(expected[name], made[name]) for name in expected), number
        claims, ours = read_lineage(alone), read_lineage(outputs[number])
        assert claims is not None
        assert ours is not None
        assert (ours.recipe, ours.adapter, ours.parents) == (claims.recipe, claims.adapter, claims.parents)
        assert ours.sft_teacher == claims.sft_teacher
        newest = sorted((pipeline.root / "several" / f"{number:02d}").iterdir())[-1]
        held = load_file(newest / "model.safetensors")
        assert all("lora_" in name for name in held), "a checkpoint holds what is trained alone"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapter": None}, "trains all weights"),
        ({"adapter": AdapterRecipe()}, "merged"),
        ({"adapter": AdapterRecipe(save="both")}, "merged"),
        ({"adapter": AdapterRecipe(save="adapter", continue_adapter=True)}, "continues"),
        ({"adapter": AdapterRecipe(save="adapter", base_dtype="bfloat16")}, "another form"),
        ({"method": "live"}, "live"),
    ],
)
def test_what_would_change_the_base_cannot_share_it(pipeline: Pipeline, kept: Path, cache: Path, change, why) -> None:
    section = pipeline.recipe.distill.model_copy(update={"adapter": AdapterRecipe(save="adapter")})
    sections = [section, section.model_copy(update=change)]
    with pytest.raises(ArgumentError, match=f"Section 1 cannot share one frozen base: .*{why}"):
        stages.distill_adapters(
            sections, DistillInputs(student=kept, cache=cache), [pipeline.root / "x"] * 2, Context()
        )
    assert not (pipeline.root / "x").exists()


def test_a_continued_adapter_keeps_its_rank_and_says_so(pipeline: Pipeline, kept: Path, cache: Path) -> None:
    student = pipeline.distill(kept, cache, "continued", save="adapter", continue_adapter=True)
    lineage = read_lineage(student)
    assert lineage is not None
    assert lineage.adapter is not None
    assert lineage.adapter.start == "continued"
    assert read_adapter(student).rank == 4
    before, after = (load_file(path / "adapter_model.safetensors") for path in (kept, student))
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


def test_a_whole_student_has_no_adapter_to_continue(pipeline: Pipeline, merged: Path) -> None:
    cache = pipeline.cache(merged)
    with pytest.raises(ConsistencyError, match="no_adapter"):
        pipeline.distill(merged, cache, "none", continue_adapter=True)


def test_all_weights_of_an_adapted_student_can_be_distilled(pipeline: Pipeline, kept: Path, cache: Path) -> None:
    section = pipeline.recipe.distill.model_copy(update={"adapter": None, "steps": 1})
    stages.distill(section, DistillInputs(student=kept, cache=cache), pipeline.root / "all", pipeline.context)
    assert inspect_model(pipeline.root / "all").adapter is None
    lineage = read_lineage(pipeline.root / "all")
    assert lineage is not None
    assert lineage.adapter is None


def test_live_distillation_trains_an_adapter(pipeline: Pipeline, kept: Path) -> None:
    section = pipeline.recipe.distill.model_copy(update={"method": "live", "steps": 2})
    inputs = DistillInputs(
        student=kept,
        teacher=pipeline.example / "teacher",
        prompts=pipeline.example / "opd.jsonl",
        rollout=pipeline.recipe.rollout,
    )
    summary = stages.distill(section, inputs, pipeline.root / "live", pipeline.context)
    assert summary.trained_parameters == 4 * sum(sum(pair) for pair in _ends(kept))


@pytest.fixture(scope="module")
def own_student(pipeline: Pipeline) -> Path:
    """An adapter on the teacher itself, fine-tuned on the teacher's own responses."""
    section = pipeline.recipe.sft.model_copy(update={"adapter": AdapterRecipe(rank=4, save="adapter")})
    inputs = SftInputs(student=pipeline.example / "teacher", responses=pipeline.root / "responses")
    stages.sft(section, inputs, pipeline.root / "own", pipeline.context)
    return pipeline.root / "own"


def live_tensors(pipeline: Pipeline, student: Path, teacher: Path, name: str) -> dict[str, torch.Tensor]:
    """What a live distillation of the student ends with."""
    adapter = AdapterRecipe(rank=4, save="adapter")
    section = pipeline.recipe.distill.model_copy(update={"method": "live", "steps": 3, "adapter": adapter})
    prompts = pipeline.example / "opd.jsonl"
    inputs = DistillInputs(student=student, teacher=teacher, prompts=prompts, rollout=pipeline.recipe.rollout)
    stages.distill(section, inputs, pipeline.root / name, pipeline.context)
    return load_file(pipeline.root / name / "adapter_model.safetensors")


def test_a_teacher_that_is_the_student_s_base_is_not_loaded_a_second_time_and_scores_to_the_bit(
    pipeline: Pipeline, own_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, loaded = pipeline.example / "teacher", []
    module = sys.modules[stages.distill.__module__]
    load = module.load_model

    def noting(path: Path, *args: Any, **kwargs: Any) -> Any:
        loaded.append(path)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(module, "load_model", noting)
    shared = live_tensors(pipeline, own_student, teacher, "live-shared")
    assert loaded == [own_student]
    monkeypatch.setattr(module, "base_as_teacher", lambda *args: None)
    apart = live_tensors(pipeline, own_student, teacher, "live-apart")
    assert loaded == [own_student, own_student, teacher]
    assert shared.keys() == apart.keys()
    assert all(torch.equal(shared[name], apart[name]) for name in shared)
    started = load_file(own_student / "adapter_model.safetensors")
    assert any(not torch.equal(shared[name][:4], started[name]) for name in started if "lora_A" in name)


def test_the_base_s_log_probs_are_those_of_the_teacher_loaded_alone(pipeline: Pipeline, own_student: Path) -> None:
    """Bitwise, top k included; the student's own log-probs are others."""
    runtime, teacher = open_runtime(pipeline.recipe.runtime), pipeline.example / "teacher"
    rows = read_shard(pipeline.root / "responses" / "responses.parquet")
    student = load_model(own_student, runtime, for_training=True, adapter=AdapterRecipe(rank=4))
    base = base_as_teacher(student, teacher, runtime)
    assert base is not None
    assert base.model is student.model
    scored = partial(score_sequences, sequences=rows, topk=4, micro_batch_tokens=512, runtime=runtime)
    alone, own = scored(load_model(teacher, runtime)), scored(student)
    with without_adapters(base.model):
        shared = scored(base)
    assert student.model.training
    for name, values in alone.columns().items():
        assert np.array_equal(shared.columns()[name], values), name
    assert not np.array_equal(own.logprobs, alone.logprobs)


def test_only_the_base_itself_in_the_teacher_s_dtype_is_shared(pipeline: Pipeline, own_student: Path) -> None:
    runtime, example = open_runtime(pipeline.recipe.runtime), pipeline.example
    on_base = load_model(own_student, runtime, for_training=True, adapter=AdapterRecipe(rank=4))
    assert base_as_teacher(on_base, example / "teacher_other_style", runtime) is None
    assert base_as_teacher(on_base, own_student, runtime) is None, "the adapter is more than its base"
    assert base_as_teacher(on_base, example / "teacher", replace(runtime, dtype=torch.bfloat16)) is None
    whole = load_model(example / "teacher", runtime, for_training=True)
    assert base_as_teacher(whole, example / "teacher", runtime) is None, "its weights are trained"
    new = load_model(example / "teacher", runtime, for_training=True, adapter=AdapterRecipe(rank=4))
    assert base_as_teacher(new, example / "teacher", runtime) is not None


def _ends(adapter: Path) -> list[tuple[int, int]]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [
        (tensors[name].shape[1], tensors[name.replace("lora_A", "lora_B")].shape[0])
        for name in tensors
        if "lora_A" in name
    ]


def test_an_adapter_is_sampled_benchmarked_and_a_teacher_like_any_model(pipeline: Pipeline, kept: Path) -> None:
    prompts = pipeline.example / "eval.jsonl"
    section = pipeline.recipe.benchmark
    inputs = BenchmarkInputs(
        models={"candidate": kept, "base": pipeline.example / "student"}, prompts=prompts, recipe_hash="x", teacher=kept
    )
    report = stages.benchmark(section, inputs, pipeline.root / "report", pipeline.context)
    mine, base = report.models
    assert mine.reverse_kl is not None
    assert base.reverse_kl is not None
    assert abs(mine.reverse_kl.value) < 1e-6 < base.reverse_kl.value, "it is its own teacher"
    few = pipeline.root / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    stages.sample(
        pipeline.recipe.sample, SampleInputs(model=kept, prompts=few), pipeline.root / "few", pipeline.context
    )
    assert len(json.loads((pipeline.root / "few" / "samples.json").read_text())) == 2
    answers = ResponsesInputs(teacher=kept, prompts=few)
    stages.generate_responses(pipeline.recipe.responses, answers, pipeline.root / "answers", pipeline.context)
    lineage = read_lineage(pipeline.root / "answers")
    assert lineage is not None
    assert lineage.sft_teacher is not None
    assert lineage.sft_teacher.identity is not None
    assert lineage.sft_teacher.identity.weights == inspect_model(kept).identity.weights


def test_the_report_says_that_an_adapter_was_trained(pipeline: Pipeline, kept: Path, merged: Path) -> None:
    """Of every model that one made: rank, layers, trained parameters; nothing of a model that was trained whole."""
    narrow = pipeline.sft("narrow", targets=["q_proj", "v_proj"], save="both")
    models = {"narrow": narrow, "merged": merged, "student": pipeline.example / "student"}
    section = pipeline.recipe.benchmark.model_copy(update={"limit": 2})
    inputs = BenchmarkInputs(models=models, prompts=pipeline.example / "eval.jsonl", recipe_hash="x")
    report = stages.benchmark(section, inputs, pipeline.root / "said", pipeline.context)
    assert report.adapters.keys() == {"narrow", "merged"}
    found = report.adapters["narrow"]
    assert (found.stage, found.rank, found.scale, found.saved) == ("sft", 4, 2.0, "both")
    assert found.targets == ["q_proj", "v_proj"]
    assert found.trained_parameters == 4 * 2 * 2 * (64 + 64)
    assert found.parameters == 108_288 + found.trained_parameters
    assert report.adapters["merged"].targets is None
    text = (pipeline.root / "said" / "report.md").read_text()
    assert "narrow: a LoRA adapter of rank 4 on q_proj, v_proj was trained from zero (sft): 2,048 of 110,336" in text
    assert "merged: a LoRA adapter of rank 4 on all linear layers" in text
    (kept / "training.json").rename(kept / "training.kept")
    (kept / "training.json").write_text('{"of": "another program"}')
    unknown = trained_adapter(kept)
    assert unknown is not None
    assert unknown.trained_parameters is None
    (kept / "training.kept").rename(kept / "training.json")


def test_a_merge_that_rounding_would_undo_is_refused_with_the_share_lost(pipeline: Pipeline) -> None:
    alerts = Alerts()
    recipe = pipeline.recipe.sft.model_copy(update={"save_dtype": "bfloat16"})
    narrow = replace(pipeline, recipe=pipeline.recipe.model_copy(update={"sft": recipe}))
    student = narrow.sft("narrow", alerts)
    assert "%" in alerts.said["lossy_merge"]
    assert {tensor.dtype for tensor in load_file(student / "model.safetensors").values()} == {torch.float32}


def test_a_bf16_run_keeps_base_and_adapter_apart(pipeline: Pipeline) -> None:
    runtime = pipeline.recipe.runtime.model_copy(update={"dtype": "bfloat16"})
    narrow = replace(pipeline, recipe=pipeline.recipe.model_copy(update={"runtime": runtime}))
    student = narrow.sft("bf16")
    assert {tensor.dtype for tensor in load_file(student / "adapter_model.safetensors").values()} == {torch.float32}
    lineage = read_lineage(student)
    assert lineage is not None
    assert lineage.adapter is not None
    assert lineage.adapter.saved == "adapter"
