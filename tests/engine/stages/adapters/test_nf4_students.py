"""Students on a base in 4 bits, through all stages: one model everywhere, and what the quantisation costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_mcp.engine import stages
from opd_mcp.engine.context import (
    BenchmarkInputs,
    DistillInputs,
)
from opd_mcp.identity.adapters import read_adapter
from opd_mcp.identity.lineage import read_lineage, verified_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.recipes import AdapterRecipe, Sampling
from tests.engine.stages.adapters.conftest import Pipeline, logits


@pytest.fixture(scope="module")
def packed(pipeline: Pipeline) -> Path:
    return pipeline.sft("packed", quantization="nf4")


def first_step(pipeline: Pipeline, student: Path, cache: Path, **adapter: Any) -> dict[str, float]:
    """The metrics of a distillation's first step: its drift is 1 where it trains the policy of the rollouts."""
    section = pipeline.recipe.distill.model_copy(update={"steps": 1, "adapter": AdapterRecipe(rank=4, **adapter)})
    output = pipeline.root / "-".join(["first", cache.name, *adapter])
    stages.distill(section, DistillInputs(student=student, cache=cache), output, pipeline.context)
    return json.loads((output / "training.json").read_text())["final"]


def test_a_4_bit_student_is_saved_as_an_adapter_and_is_the_dequantised_model(pipeline: Pipeline, packed: Path) -> None:
    lineage = verified_lineage(packed, full=True)
    assert lineage is not None
    assert lineage.adapter is not None
    assert lineage.model is not None
    assert (lineage.adapter.quantization, lineage.adapter.saved) == ("nf4", "adapter")
    assert lineage.adapter.kernel == f"torch {torch.__version__}"
    assert lineage.adapter.base == inspect_model(pipeline.example / "student").identity, "found by the original's hash"
    assert lineage.model.quantization == "nf4"
    assert read_adapter(packed).quantization == "nf4"
    summary = json.loads((packed / "training.json").read_text())
    assert summary["parameters"] == inspect_model(packed).parameters


def test_rollouts_of_a_4_bit_student_are_of_the_model_that_is_distilled(pipeline: Pipeline, packed: Path) -> None:
    """The adapter says so itself: whether the distillation names the quantization again makes no difference."""
    cache = pipeline.cache(packed)
    for adapter in ({}, {"quantization": "nf4"}):
        assert first_step(pipeline, packed, cache, **adapter)["drift_mean"] == pytest.approx(1.0, abs=1e-4)


def test_a_whole_student_is_quantised_before_its_rollouts_or_not_at_all(pipeline: Pipeline, merged: Path) -> None:
    plain, packed = pipeline.cache(merged), pipeline.cache(merged, "nf4")
    with pytest.raises(ConsistencyError, match="behaviour_mismatch"):
        first_step(pipeline, merged, plain, quantization="nf4")
    with pytest.raises(ConsistencyError, match="behaviour_mismatch"):
        first_step(pipeline, merged, packed)
    assert first_step(pipeline, merged, packed, quantization="nf4")["drift_mean"] == pytest.approx(1.0, abs=1e-4)


def test_merging_a_4_bit_student_keeps_the_dequantised_weights(pipeline: Pipeline, packed: Path) -> None:
    whole = pipeline.sft("whole", quantization="nf4", save="merged")
    assert inspect_model(whole).adapter is None
    assert (logits(whole) - logits(packed)).abs().max() <= 1e-4
    lineage = read_lineage(whole)
    assert lineage is not None
    assert lineage.adapter is not None
    assert (lineage.adapter.quantization, lineage.adapter.saved) == ("nf4", "merged")


@pytest.mark.parametrize("recorded", [True, False], ids=["adapter", "whole"])
def test_the_report_says_what_the_quantisation_cost(
    pipeline: Pipeline, packed: Path, merged: Path, recorded: bool
) -> None:
    """Both forms of the student that the training began with are rows, and their KL is measured."""
    student = packed if recorded else merged
    inputs = BenchmarkInputs(
        models={"distilled": pipeline.example / "student", "sft": student},
        prompts=pipeline.example / "eval.jsonl",
        recipe_hash="x",
        forms={"sft": "nf4"},
    )
    output = pipeline.root / f"report-{recorded}"
    few = {"limit": 3, "kl_prompts": 2, "sampling": Sampling(max_new_tokens=12)}
    report = stages.benchmark(pipeline.recipe.benchmark.model_copy(update=few), inputs, output, pipeline.context)
    cost = report.quantisation
    assert cost is not None
    assert (cost.quantised, cost.plain) == (("sft", "sft, not quantised") if recorded else ("sft, nf4", "sft"))
    rows = {score.name: score.identity for score in report.models}
    assert list(rows) == ["distilled", "sft", cost.plain if recorded else cost.quantised]
    assert (rows[cost.quantised].quantization, rows[cost.plain].quantization) == ("nf4", None)
    assert 0 < cost.reverse_kl.low <= cost.reverse_kl.value < 5
    assert cost.accuracy_difference is not None
    text = (output / "report.md").read_text()
    assert "π_ref, the rollouts and the training are those of the dequantised weights" in text


def test_a_student_without_quantisation_has_no_cost_of_it(pipeline: Pipeline, kept: Path) -> None:
    inputs = BenchmarkInputs(
        models={"candidate": kept}, prompts=pipeline.example / "eval.jsonl", recipe_hash="x", forms={}
    )
    report = stages.benchmark(pipeline.recipe.benchmark, inputs, pipeline.root / "plain", pipeline.context)
    assert report.quantisation is None
    assert [score.name for score in report.models] == ["candidate"]
