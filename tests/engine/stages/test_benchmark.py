"""Reports of the benchmark stage on the arithmetic example: rows, graders, notes, the teacher's answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from opd_mcp.engine import stages
from opd_mcp.engine.context import (
    BenchmarkInputs,
    SftInputs,
)
from opd_mcp.engine.evaluation.model_score import asked
from opd_mcp.engine.models.loading import copy_tokenizer
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import BenchmarkReport, TrainingSummary
from opd_mcp.schemas.runs import Alert
from tests.engine.stages.conftest import Alerts, Made


def test_benchmark_measures_candidate_and_baselines_on_the_same_prompts(made: Made) -> None:
    report = stages.benchmark(
        made.recipe.benchmark,
        BenchmarkInputs(
            models={"student": made.sft, "teacher": made.teacher},
            prompts=made.prompts,
            recipe_hash="abc",
            teacher=made.teacher,
            alerts=[Alert(time="2026-08-01T10:00:00.000Z", code="rollouts_stale", message="The student\nhas moved.")],
        ),
        made.root / "report",
        made.context,
    )
    student, teacher = report.models
    assert teacher.greedy_accuracy.value > 0.9
    assert teacher.reverse_kl.value == pytest.approx(0, abs=1e-6)
    assert student.reverse_kl.value > 0.1
    assert set(student.pass_at_k) == {"1", "2"}
    assert student.pass_at_k["1"] == pytest.approx(student.sampled_accuracy.value)
    assert report.comparisons[0].baseline == "teacher"
    assert report.teacher_basis == "proven"
    for sample in report.samples:  # each one's tokens against the teacher's
        assert sample.tokens["teacher"].log_ratios == pytest.approx([0] * len(sample.tokens["teacher"].ends), abs=1e-3)
        tokens, said = sample.tokens["student"], sample.responses["student"]
        assert len(tokens.ends) == len(tokens.log_ratios)
        assert tokens.ends == sorted(tokens.ends)
        assert tokens.ends[-1] == len(said)
    ratios = [ratio for sample in report.samples for ratio in sample.tokens["student"].log_ratios]
    assert min(ratios) < -0.1  # it says things that the teacher would not
    text = (made.root / "report" / "report.md").read_text()
    assert "| student |" in text
    assert "- 2026-08-01T10:00:00.000Z `rollouts_stale`: The student has moved." in text
    assert BenchmarkReport.from_json((made.root / "report" / "report.json").read_bytes()).alerts == report.alerts
    assert (report.grader, report.grader_reason) == ("regex", "the recipe has an answer_pattern")


def test_without_a_pattern_the_answers_choose_the_grader_and_the_report_counts_what_it_could_not_read(
    made: Made,
) -> None:
    recipe = made.recipe.benchmark.model_copy(update={"answer_pattern": None, "samples_per_prompt": 0, "limit": 8})
    cut = recipe.model_copy(
        update={"grader": "boxed", "sampling": recipe.sampling.model_copy(update={"max_new_tokens": 1})}
    )
    chosen, named = (
        stages.benchmark(
            settings,
            BenchmarkInputs(models={"teacher": made.teacher}, prompts=made.prompts, recipe_hash="abc"),
            made.root / f"report-{settings.grader}",
            made.context,
        )
        for settings in (recipe, cut)
    )
    assert (chosen.grader, chosen.grader_reason) == ("number", "every answer is a number")
    assert chosen.models[0].greedy_accuracy.value > 0.9, "its answer is the last number of a response"
    assert chosen.models[0].answers.without_answer == 0
    counts = named.models[0].answers
    assert (named.grader, counts.responses, counts.without_answer) == ("boxed", 8, 8)
    assert len(counts.examples) == 3
    text = (made.root / "report-boxed" / "report.md").read_text()
    assert "Answers graded by `boxed`: named by the recipe." in text
    assert "teacher: 8 of 8 responses had no extractable answer; they end: `" in text


def test_teacher_and_base_are_rows_and_the_share_of_the_gap_is_said(made: Made, example: Path, tmp_path: Path) -> None:
    reporter = Alerts()
    recipe = made.recipe.benchmark.model_copy(update={"limit": 40, "kl_prompts": 2})
    report = stages.benchmark(
        recipe,
        BenchmarkInputs(
            models={"distilled": made.teacher, "sft": made.sft},
            references={"teacher": made.teacher, "base": example / "student"},
            not_measured={"somebody": "is not here"},
            prompts=made.prompts,
            recipe_hash="abc",
            teacher=made.teacher,
        ),
        tmp_path,
        replace(made.context, reporter=reporter),
    )
    assert [model.name for model in report.models] == ["distilled", "sft", "teacher", "base"]
    assert report.models[2].reverse_kl is None, "the teacher's divergence from itself"
    sft, base = report.gap_closed
    assert (sft.baseline, base.baseline) == ("sft", "base")
    assert sft.share is not None
    assert sft.share.low < sft.share.value == pytest.approx(1.0, abs=0.1)
    text = (tmp_path / "report.md").read_text()
    assert "Share of the gap from sft to teacher that distilled closed: 1.0" in text
    assert "| somebody | not measured: is not here |" in text
    message = reporter.said["answers_truncated"]
    assert message.startswith("Responses cut at 64 tokens: ")
    assert "% of sft" in message
    assert "base" not in message, "a base that never learnt to stop is no news"
    assert "raise 'benchmark.sampling.max_new_tokens'" in message
    assert f"Note: {message}" in text


def test_a_template_stands_around_each_prompt_or_around_a_chat_s_last_question(made: Made, tmp_path: Path) -> None:
    row = asked(PromptRow("0", prompt="1+1=?"), "Solve {prompt} in $\\boxed{}$.")
    assert row.prompt == "Solve 1+1=? in $\\boxed{}$."
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    chat = asked(PromptRow("0", messages=turns), "<{prompt}>")
    assert [turn["content"] for turn in chat.messages or ()] == ["a", "b", "<c>"]
    changed = made.recipe.benchmark.model_copy(update={"prompt_template": "0*0+{prompt}", "samples_per_prompt": 0})
    plain, within = (
        stages.benchmark(
            section,
            BenchmarkInputs(models={"teacher": made.teacher}, prompts=made.prompts, recipe_hash="abc", suite="sums"),
            tmp_path / str(section.prompt_template is None),
            made.context,
        )
        for section in (changed.model_copy(update={"prompt_template": None}), changed)
    )
    assert plain.prompts_sha256 == within.prompts_sha256, "the data is the same; the recipe has the template"
    assert plain.models[0].tokens != within.models[0].tokens
    assert "Suite `sums`, with its published settings." in (tmp_path / "True" / "report.md").read_text()
    assert "Each prompt stands in '0*0+{prompt}'." in (tmp_path / "False" / "report.md").read_text()


def test_references_are_left_out_where_there_is_no_accuracy_to_compare(made: Made, tmp_path: Path) -> None:
    unanswered = tmp_path / "prompts.jsonl"
    unanswered.write_text('{"prompt": "1+1=?"}\n{"prompt": "1+2=?"}\n')
    report = stages.benchmark(
        made.recipe.benchmark,
        BenchmarkInputs(
            models={"sft": made.sft}, references={"teacher": made.teacher}, prompts=unanswered, recipe_hash="abc"
        ),
        tmp_path / "report",
        made.context,
    )
    assert [model.name for model in report.models] == ["sft"]
    assert report.gap_closed == []


def test_the_teacher_s_responses_are_graded_before_the_student_learns_from_them(
    made: Made, example: Path, tmp_path: Path
) -> None:
    def trained(grading: BenchmarkRecipe, name: str) -> tuple[TrainingSummary, dict[str, str]]:
        reporter = Alerts()
        inputs = SftInputs(student=example / "student", responses=made.root / "responses", grading=grading)
        section = made.recipe.sft.model_copy(update={"steps": 1})
        summary = stages.sft(section, inputs, tmp_path / name, replace(made.context, reporter=reporter))
        return summary, reporter.said

    right, quiet = trained(made.recipe.benchmark, "right")
    assert right.teacher_responses is not None
    assert right.teacher_responses.right.value > 0.9
    assert right.teacher_responses.right.samples == 24
    assert quiet == {}
    wrong, alerts = trained(made.recipe.benchmark.model_copy(update={"answer_pattern": r"(never)"}), "wrong")
    assert wrong.teacher_responses is not None
    assert wrong.teacher_responses.right.value == 0
    assert len(wrong.teacher_responses.wrong) == 3
    message = alerts["teacher_often_wrong"]
    assert "Only 0 of 24 responses of the teacher are right by `regex`" in message
    assert message.count("read nothing, response ends `…") == 3
    ungraded, failed = trained(made.recipe.benchmark.model_copy(update={"grader": "code"}), "ungraded")
    assert ungraded.teacher_responses is None, "training needs no grader"
    assert list(failed) == ["responses_not_graded"]


def test_a_teacher_that_can_only_score_is_no_row_of_the_report(made: Made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = tmp_path / "scorer"
    OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=22, n_embd=16, n_layer=1, n_head=2)).save_pretrained(scorer)
    copy_tokenizer(made.teacher, scorer)
    report = stages.benchmark(
        made.recipe.benchmark.model_copy(update={"limit": 4, "kl_prompts": 2}),
        BenchmarkInputs(
            models={"sft": made.sft},
            references={"teacher": scorer, "base": made.teacher},
            prompts=made.prompts,
            recipe_hash="abc",
            teacher=scorer,
        ),
        tmp_path / "report",
        made.context,
    )
    assert [model.name for model in report.models] == ["sft", "base"]
    assert report.models[0].reverse_kl is not None
    assert "The teacher's accuracy is not measured" in report.warnings[0]
