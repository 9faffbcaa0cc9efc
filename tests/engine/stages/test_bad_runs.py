"""Runs that went wrong in the ways that people make them go wrong: each ends with a verdict that names the cause."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_mcp.engine import stages
from opd_mcp.engine.context import BenchmarkInputs, Context, DistillInputs, SftInputs, SilentReporter
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.recipes import Preset, Recipe
from opd_mcp.schemas.reports import BenchmarkReport, StageCost
from opd_mcp.schemas.resolve import far_rates, resolve_recipe
from opd_mcp.schemas.runs import Alert

SHORT = {
    "runtime.device": "cpu",
    "sft.steps": 12,
    "sft.batch_size": 16,
    "distill.steps": 8,
    "distill.batch_size": 8,
    "rollout.sampling.max_new_tokens": 16,
    "benchmark.sampling.max_new_tokens": 32,
    "benchmark.answer_pattern": r"#(\d)",
    "benchmark.limit": 40,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 16,
}
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
TEACHER, STUDENT, OTHER = (EXAMPLE / name for name in ("teacher", "student", "teacher_other_style"))


class Journal(SilentReporter):
    """Keeps alerts as a run's journal does."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    def alert(self, code: str, message: str) -> None:
        self.alerts.append(Alert(time="2026-08-01T10:00:00.000Z", code=code, message=message))

    @property
    def codes(self) -> set[str]:
        return {alert.code for alert in self.alerts}


class Run:
    """The stages of one run as a worker calls them."""

    def __init__(self, folder: Path, preset: Preset, **overrides: object) -> None:
        torch.set_num_threads(1)
        self.folder, self.journal = folder, Journal()
        self.recipe: Recipe = resolve_recipe(preset, SHORT | overrides)
        self.context = replace(Context(self.recipe.runtime, self.recipe.prompting), reporter=self.journal)
        self.stages: list[str] = []

    def begin(self, stage: str) -> None:
        self.stages.append(stage)
        for rate in far_rates(self.recipe, [stage], inspect_model(STUDENT).parameters):
            self.journal.alert(rate.code, f"{rate.message} {rate.fix}")

    def sft(self, student: Path, responses: Path) -> Path:
        self.begin("sft")
        inputs = SftInputs(
            student=student, responses=responses, sft_teacher=asserted_claim(inspect_model(TEACHER).identity.name)
        )
        stages.sft(self.recipe.sft, inputs, self.folder / "sft", self.context)
        return self.folder / "sft"

    def distill(self, student: Path) -> Path:
        self.begin("distill")
        section = self.recipe.distill.model_copy(update={"method": "live"})
        inputs = DistillInputs(
            student=student, teacher=TEACHER, prompts=EXAMPLE / "opd.jsonl", rollout=self.recipe.rollout,
            sft_teacher=asserted_claim("somebody"), allow_teacher_mismatch=True,
        )  # fmt: skip
        stages.distill(section, inputs, self.folder / "distilled", self.context)
        return self.folder / "distilled"

    def report(self, models: Mapping[str, Path]) -> BenchmarkReport:
        inputs = BenchmarkInputs(
            models=models, references={"teacher": TEACHER}, teacher=TEACHER, prompts=EXAMPLE / "opd.jsonl",
            recipe_hash="0" * 64, costs=[StageCost(stage=stage, seconds=1.0) for stage in self.stages],
            alerts=list(self.journal.alerts),
        )  # fmt: skip
        report = stages.benchmark(self.recipe.benchmark, inputs, self.folder / "report", self.context)
        assert f"**{report.verdict.judgement.replace('_', ' ')}**" in (self.folder / "report" / "report.md").read_text()
        page = (self.folder / "report" / "report.html").read_text()
        assert f'<section class="{report.verdict.judgement} bad">' in page, "it is shown in red"
        return report


def test_a_rate_a_hundred_times_too_high_is_worse_and_names_the_rate(tmp_path: Path) -> None:
    run = Run(tmp_path, "demo", **{"distill.optimizer.learning_rate": 0.3})
    report = run.report({"distilled": run.distill(OTHER), "sft": OTHER})
    assert report.models[1].greedy_accuracy.value > 0.8
    assert report.verdict.judgement == "worse"
    assert "'distill.optimizer.learning_rate' is too high: 0.3, 100 times the 0.003 at which" in report.verdict.cause
    fix = "Set 'distill.optimizer.learning_rate' to about 0.003, and 'distill.steps' to 400."
    assert fix in report.verdict.cause, "this run is short"
    assert "learning_rate_far" in report.verdict.next_action.why


def test_a_wrong_answer_pattern_is_unknown_and_names_the_grader(tmp_path: Path) -> None:
    run = Run(tmp_path, "demo", **{"benchmark.answer_pattern": r"answer: (\d)"})
    report = run.report({"distilled": TEACHER, "sft": OTHER})
    assert report.verdict.judgement == "unknown"
    assert r"with the pattern `answer: (\d)`" in report.verdict.cause
    assert "'benchmark.answer_pattern'" in report.verdict.cause
    assert "benchmark_zero" in run.journal.codes
    assert report.verdict.next_action.tool == "benchmark_student"


def test_an_untrained_student_with_quick_shows_no_difference_and_names_preset_and_sft(tmp_path: Path) -> None:
    run = Run(tmp_path, "quick")
    sft = run.sft(STUDENT, EXAMPLE / "responses" / "teacher.jsonl")
    report = run.report({"distilled": run.distill(sft), "sft": sft})
    assert {"preset_rates", "sft_undertrained"} <= run.journal.codes
    assert report.verdict.judgement == "no_difference"
    assert "as preset 'quick' has it, is too low: " in report.verdict.cause
    assert "'sft.optimizer.learning_rate'" in report.verdict.cause


def test_empty_answers_are_a_collapse(tmp_path: Path) -> None:
    """SFT on responses that are nothing but the end of the turn."""
    run = Run(tmp_path, "demo")
    prompts = [json.loads(line) for line in (EXAMPLE / "sft.jsonl").read_text().splitlines()[:32]]
    rows = [{"prompt": row["prompt"], "response": "", "response_ids": [1]} for row in prompts]
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run.report({"sft": run.sft(OTHER, responses), "base": OTHER})
    assert report.verdict.judgement == "worse"
    assert "sft has collapsed: 100% of its responses are empty (0% of base's)" in report.verdict.cause
    assert "collapse" in run.journal.codes
    assert "Lower 'sft.optimizer.learning_rate' to a tenth, and look at the responses" in report.verdict.cause
    assert "(only white space" not in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(("stage", "rate", "code"), [("sft", 0.04, "learning_rate_far"), ("distill", 3e-3, None)])
def test_only_a_factor_of_ten_is_far(stage: str, rate: float, code: str | None) -> None:
    recipe = resolve_recipe("demo", {f"{stage}.optimizer.learning_rate": rate})
    assert [found.code for found in far_rates(recipe, [stage], 400_000)] == ([code] if code else [])
    assert [found.code for found in far_rates(recipe, [stage], 4_000_000_000)] == ([code] if code else ["preset_rates"])
    adapted = resolve_recipe("demo", {f"{stage}.optimizer.learning_rate": rate, f"{stage}.adapter": {}})
    assert far_rates(adapted, [stage], 400_000) == [], "an adapter takes ten times more"
