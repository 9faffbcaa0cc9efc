"""Several teachers by domain: each answers and scores its own rows, is loaded once, and counts as much as it shall."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.cache.flat import open_flat
from opd_mcp.engine.cache.manifest import read_cache, read_rollouts
from opd_mcp.engine.cache.shards import read_shard
from opd_mcp.engine.cache.verify import verified
from opd_mcp.engine.context import BenchmarkInputs, DistillInputs, ResponsesInputs, SftInputs, SilentReporter
from opd_mcp.engine.data.batches import StepData, steps_by_domain
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.losses.objectives import distill_objective
from opd_mcp.engine.scoring import panel
from opd_mcp.engine.scoring.local import rescorer
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.panels import panel_identity
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, DataError, RunError
from opd_mcp.schemas.recipes import DistillRecipe, Sampling
from opd_mcp.schemas.reports import RepairSummary, TrainingSummary


@pytest.fixture
def build(build):
    return build.shorter()


@pytest.fixture
def teachers(example):
    return {"plain": example / "teacher", "styled": example / "teacher_other_style"}


@pytest.fixture
def prompts(example, tmp_path) -> Path:
    """Every third prompt belongs to the styled teacher."""
    rows = [json.loads(line) for line in (example / "opd.jsonl").read_text().splitlines()[:18]]
    file = tmp_path / "prompts.jsonl"
    named = [row | {"teacher_domain": "plain" if number % 3 else "styled"} for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in named))
    return file


@pytest.fixture
def panel_cache(build, prompts, teachers):
    """`panel_cache(name, **changes)`: a cache that both teachers scored."""

    def built(name="cache", **changes):
        rollouts = build.root / f"{name}-rollouts"
        if not rollouts.exists():
            build.rollouts(rollouts.name, prompts=prompts, tokenizer=build.teacher)
        return build.cache(rollouts, name, **{"teachers": teachers, "allow_teacher_mismatch": True} | changes)

    return built


def forward(model, prompt, response):
    """log π [T] of a response, by a plain forward pass."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *response]])
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0].double()
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return rows[torch.arange(len(response)), torch.tensor(response)].numpy()


def test_each_teacher_is_loaded_once_and_scores_its_rows(panel_cache, teachers, monkeypatch):
    loads, real = [], panel.open_local
    monkeypatch.setattr(panel, "open_local", lambda path, *given: loads.append(path.name) or real(path, *given))
    cache = panel_cache()
    manifest, rows = read_cache(cache)
    assert len(manifest.shards) == 2
    assert loads == ["teacher", "teacher_other_style"]
    assert manifest.domains == Counter(rows.domains) == {"plain": 10, "styled": 6}
    assert {domain: member.name for domain, member in manifest.teacher.members.items()} == {
        "plain": "teacher",
        "styled": "teacher_other_style",
    }
    for row in (0, 9, 15):
        expected = forward(teachers[rows.domains[row]], rows.prompt(row).tolist(), rows.response(row).tolist())
        assert np.abs(expected - rows.column("teacher_logprobs", row)).max() < 1e-4
    named = {line["id"]: line["teacher_domain"] for line in _lines(cache.parent / "prompts.jsonl")}
    assert [named[row_id] for row_id in rows.prompt_row_ids] == list(rows.domains)
    assert list(open_flat(cache).domains) == list(rows.domains)
    for name in ("teacher", "teacher_other_style"):
        path = teachers["plain"].with_name(name)
        one = inspect_model(path).identity
        assert verified(cache, rescorer(path), teacher=one).problems == []
    assert read_lineage(cache).parents[0].identity.members.keys() == {"plain", "styled"}


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_interrupted_build_goes_on_to_the_same_content(panel_cache, build, content, stopping):
    whole = panel_cache("whole")
    with pytest.raises(RunError, match="run_cancelled"):
        panel_cache("part", context=build.context(reporter=stopping(after=1)))
    assert content(panel_cache("part")) == content(whole)


def test_rows_of_no_teacher_and_of_no_domain_are_refused(build, panel_cache, prompts, teachers):
    with pytest.raises(DataError, match=r"unknown_domain.*'styled'"):
        panel_cache("lacking", teachers={"plain": teachers["plain"]})
    rollouts = build.rollouts("undivided")
    with pytest.raises(DataError, match=r"unknown_domain.*no `teacher_domain`"):
        build.cache(rollouts, "none", teachers=teachers, allow_teacher_mismatch=True)
    some = [{name: value for name, value in row.items() if name != "teacher_domain"} for row in _lines(prompts)[:1]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*some, *_lines(prompts)[1:]]))
    with pytest.raises(DataError, match="1 of 18 prompts have no"):
        build.rollouts("mixed", prompts=prompts)


def test_teachers_of_another_template_are_refused(teachers):
    one, two = (inspect_model(path).identity for path in teachers.values())
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*chat_template"):
        panel_identity({"a": one, "b": two.model_copy(update={"chat_template": "0" * 64})})
    with pytest.raises(ArgumentError, match="invalid_argument"):
        panel_identity({"a b": one})
    assert panel_identity({"a": one, "b": two}).same_model(panel_identity({"b": two, "a": one}))
    assert not panel_identity({"a": one, "b": two}).same_model(panel_identity({"a": two, "b": one}))


def test_each_prompts_response_comes_from_its_teacher_and_proves_it_row_by_row(build, prompts, teachers, example):
    responses, student = build.root / "responses", build.root / "sft"
    inputs = ResponsesInputs(teacher=build.teacher, teachers=teachers, prompts=prompts)
    stages.generate_responses(build.recipe.responses, inputs, responses, build.context())
    rows = read_shard(responses / "responses.parquet")
    assert Counter(rows.domains) == {"plain": 6, "styled": 3}
    for row in (0, 8):
        expected = forward(teachers[rows.domains[row]], rows.prompt(row).tolist(), rows.response(row).tolist())
        assert np.abs(expected - rows.column("behaviour_logprobs", row)).max() < 1e-4
    stages.sft(build.recipe.sft, SftInputs(student=example / "student", responses=responses), student, build.context())
    assert read_lineage(student).sft_teacher.identity.members.keys() == {"plain", "styled"}
    rollouts = build.rollouts("rollouts", student=student, prompts=prompts)
    manifest = read_manifest(build.cache(rollouts, "cache", student=student, teachers=teachers))
    assert (manifest.sft_teacher.basis, manifest.teacher_delta.basis) == ("proven", "by_construction")
    swapped = dict(zip(teachers, reversed(teachers.values()), strict=True))
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        build.cache(rollouts, "swapped", student=student, teachers=swapped)
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        build.cache(rollouts, "one", student=student, teacher=teachers["plain"])
    lines = [line for line in _lines(prompts) if line["teacher_domain"] == "plain"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    some = build.rollouts("some", student=student, prompts=prompts)
    build.cache(some, "some-cache", student=student, teachers={"plain": teachers["plain"]})


class Measured(SilentReporter):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def metric(self, step, values) -> None:
        self.steps.append(dict(values))


def test_training_tells_each_domains_reverse_kl_and_weighs_it(build, panel_cache, teachers):
    cache, student = panel_cache(), build.student
    inputs = DistillInputs(student=student, cache=cache, allow_teacher_mismatch=True)
    reporters = {}
    for name, weights in (("same", None), ("styled only", {"plain": 0.0})):
        reporters[name] = Measured()
        section = build.recipe.distill.model_copy(update={"domain_weights": weights, "batch_size": 16})
        context = build.context(reporter=reporters[name])
        stages.distill(section, inputs, build.root / name, context)
    same, only = (reporter.steps for reporter in reporters.values())
    assert {"reverse_kl_k1_plain", "reverse_kl_k1_styled"} <= same[0].keys()
    each = same[0]["reverse_kl_k1_plain"], same[0]["reverse_kl_k1_styled"]
    assert min(each) < same[0]["reverse_kl_k1"] < max(each)
    assert only[0]["reverse_kl_k1"] == same[0]["reverse_kl_k1"]
    assert only[0]["gradient_norm"] != same[0]["gradient_norm"]
    unknown = build.recipe.distill.model_copy(update={"domain_weights": {"code": 2.0}})
    with pytest.raises(ArgumentError, match=r"domain_weights names code.*plain, styled"):
        stages.distill(unknown, inputs, build.root / "no", build.context())


def test_the_report_has_each_domains_scores_and_the_repair_of_a_training(build, prompts, teachers):
    student = Path(shutil.copytree(teachers["styled"], build.root / "styled"))
    repair = RepairSummary(tokens=9, folds=5, mean_difference=-2, mean_residual=-1.5, explained_variance=0.5)
    told = {"steps": 1, "seconds": 1, "seconds_per_step": 1, "trained_tokens": 9, "parameters": 9, "device": "CPU"}
    (student / "training.json").write_text(TrainingSummary(**told, repair=repair).to_json())
    short = {"samples_per_prompt": 0, "sampling": Sampling(max_new_tokens=16), "kl_prompts": 18}
    section = build.recipe.benchmark.model_copy(update=short)
    inputs = {"models": {"styled": student}, "prompts": prompts, "recipe_hash": "x", "teachers": teachers}
    report = stages.benchmark(section, BenchmarkInputs(**inputs), build.root / "report", build.context())
    whole, domains = report.models[0], report.models[0].by_domain
    assert {name: score.greedy_accuracy.samples for name, score in domains.items()} == {"plain": 12, "styled": 6}
    right = sum(score.greedy_accuracy.value * score.greedy_accuracy.samples for score in domains.values())
    assert right == pytest.approx(whole.greedy_accuracy.value * 18)
    assert abs(domains["styled"].reverse_kl.value) < 1e-6, "it is the teacher of these"
    assert domains["plain"].reverse_kl.value > 1
    text = (build.root / "report" / "report.md").read_text()
    assert f"| styled | plain | {domains['plain'].greedy_accuracy.value:.3f} [" in text
    assert report.repairs == {"styled": repair}
    assert repair.text("styled") in text
    assert "<td>plain</td>" in (build.root / "report" / "report.html").read_text()


def test_weighed_rows_have_the_gradient_of_their_share(tiny_model, runtime):
    model = tiny_model(seed=0)
    rows = build_sequences([[2, 3], [3, 2], [2, 2]], [[2, 1], [3, 1], [3, 3, 1]])
    tokens = len(rows.response_ids)
    rows = replace(rows, domains=["a", "b", "b"]).with_columns(teacher_logprobs=np.full(tokens, -1.0, np.float32))
    settings = StepSettings("sample", 64, replace(runtime, dtype=torch.float64))
    objective = distill_objective(DistillRecipe())

    def gradient(data):
        model.zero_grad()
        accumulate_gradients(model, data, objective, settings)
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    each = [gradient(StepData(rows, np.array([row]))) for row in range(3)]
    whole = StepData(rows, np.arange(3))
    weighed = next(steps_by_domain(lambda first: iter([whole]), {"a": 1, "b": 2}, {"a": 4.0})(0))
    assert weighed.row_weights.tolist() == [2.0, 0.5, 0.5]
    expected = (2.0 * each[0] + 0.5 * each[1] + 0.5 * each[2]) / 3
    assert (gradient(weighed) - expected).norm() < 1e-5 * expected.norm()
    plain = next(steps_by_domain(lambda first: iter([whole]), {"a": 1, "b": 2}, {})(0))
    assert plain.row_weights is None
    assert torch.equal(gradient(plain), gradient(whole))


def test_rollouts_without_domains_keep_their_order(build, drawn):
    ids = read_rollouts(drawn).prompt_row_ids
    assert ids[:3] == ["opd-0000", "opd-0001", "opd-0002"]
