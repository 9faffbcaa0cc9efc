"""The one-command distillation: on a few rows with tiny step counts, and refused before any work."""

import json
import re
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, ResponsesInputs
from opd_mcp.identity.consistency import sft_teacher
from opd_mcp.identity.data.rows import PROMPT_COLUMNS, PromptRow, ResponseRow
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.identity.signatures import below
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.recipes import ResponsesRecipe, Sampling
from opd_mcp.schemas.reports import BenchmarkReport, TrainingSummary

SCRIPT = "lightning_opd_distill.py"
FLAGS = {
    "--student_model_path",
    "--teacher_model",
    "--teacher_responses_dataset",
    "--unlabeled_prompts_dataset",
    "--output_model_path",
    "--epochs",
    "--learning_rate",
    "--device",
}


@pytest.fixture
def distill(run_example, few_rows, examples, tmp_path):
    """Runs the script on 40 responses and 30 prompts; any flag may be given otherwise."""

    def run(**changes):
        task = examples / "arithmetic"
        flags = {
            "student_model_path": task / "student",
            "teacher_model": task / "teacher",
            "teacher_responses_dataset": few_rows("responses/teacher.jsonl", 40),
            "unlabeled_prompts_dataset": few_rows("opd.jsonl", 30),
            "output_model_path": tmp_path / "out" / "distilled",
            "device": "cpu",
            **changes,
        }
        return run_example(SCRIPT, *(part for name, value in flags.items() for part in (f"--{name}", value)))

    return run


def other_responses(examples: Path, prompts: Path, output: Path) -> Path:
    """Responses whose lineage proves that another teacher gave them."""
    recipe = ResponsesRecipe(sampling=Sampling(max_new_tokens=64))
    teacher = examples / "arithmetic" / "teacher_other_style"
    stages.generate_responses(recipe, ResponsesInputs(teacher=teacher, prompts=prompts), output, Context())
    return output


def refusal(done) -> str:
    """The one line on stderr of a run that made nothing."""
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_one_command_makes_a_student_with_lineage_and_report(distill, tmp_path):
    done = distill(epochs="2,3", learning_rate="1e-3,5e-4")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "out" / "distilled"

    # 2 epochs of 40 responses in batches of 32; 3 of the 27 prompts that are left when every tenth is held out
    assert "  3 steps of" in done.stdout
    assert TrainingSummary.from_json((output / "training.json").read_bytes()).steps == 3
    recipe = json.loads((output / "report" / "recipe.json").read_bytes())
    assert (recipe["sft"]["steps"], recipe["sft"]["optimizer"]["learning_rate"]) == (3, 1e-3)
    assert (recipe["distill"]["steps"], recipe["distill"]["optimizer"]["learning_rate"]) == (3, 5e-4)
    assert recipe["distill"]["batch_size"] == 27

    lineage = verified_lineage(output)
    assert lineage.sft_teacher.basis == "asserted"
    assert lineage.distilled_from.name == "teacher"
    assert lineage.model.name == "distilled"
    report = BenchmarkReport.from_json((output / "report" / "report.json").read_bytes())
    assert [model.name for model in report.models] == ["distilled", "sft"]
    assert report.prompts_with_answer == 3
    assert [cost.stage for cost in report.costs] == ["sft", "rollout", "score", "distill"]
    assert "greedy accuracy" in done.stdout
    assert [path.name for path in output.parent.iterdir()] == ["distilled"], "no intermediate is left behind"

    assert "[invalid_argument] The output directory exists." in refusal(distill())


def test_responses_proven_to_be_another_teachers_are_refused_with_both_names(distill, examples, few_rows, tmp_path):
    responses = other_responses(examples, few_rows("sft.jsonl", 4), tmp_path / "other")
    assert sft_teacher(responses, made_here=below(responses)).basis == "proven"
    text = refusal(distill(teacher_responses_dataset=responses))
    assert "[teacher_mismatch]" in text
    assert "teacher_other_style@" in text
    assert "teacher@" in text
    assert not any((tmp_path / "out").iterdir())


def test_a_hub_data_set_without_a_network_is_one_clear_error(examples, monkeypatch, tmp_path):
    from distill_inputs import data_path

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"\[offline\].*'org/prompts'") as refused:
        data_path("org/prompts", PROMPT_COLUMNS, tmp_path / "download.parquet")
    assert "JSONL or Parquet" in refused.value.fix


def test_the_command_takes_exactly_the_documented_flags(run_example):
    help_text = run_example(SCRIPT, "--help").stdout
    usage = help_text.split("Distill a student")[0]
    assert set(re.findall(r"--\w+", usage)) == FLAGS
    assert "ceil(E · R / B) steps" in help_text
    bad = run_example(SCRIPT, "--epochs", "1,2,3")
    assert bad.returncode == 2
    assert "'1,2,3' is not one or two positive numbers" in bad.stderr


def test_held_out_prompts_have_answers_and_were_seen_nowhere(examples):
    from distill_inputs import split

    rows = [PromptRow(id=str(i), prompt=f"p{i}", answer=None if i % 2 else "1") for i in range(60)]
    training, held_out = split(rows, seen={"p0", "p2"})
    assert [row.id for row in held_out] == ["4", "24", "44"]
    assert len(training) == 57
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    assert split(rows[1::2], seen=set()) == (rows[1::2], [])
    assert split(rows[:1], seen=set()) == (rows[:1], []), "the only prompt is trained on"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("3+8=1;#1", "1"),
        (r"Half of it: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("We add. The answer is 12.", "12"),
        ("first 3, then 42", "42"),
        ("Paris", "Paris"),
    ],
)
def test_the_form_of_answers_is_learned_from_the_teachers_responses(examples, response, answer):
    from distill_inputs import answer_pattern

    from opd_mcp.grading.extraction import compiled_pattern, extracted_answer

    labelled = ResponseRow(PromptRow(id="0", prompt="?", answer=answer), response=response)
    assert extracted_answer(response, compiled_pattern(answer_pattern([labelled]))) == answer
    unlabelled = ResponseRow(PromptRow(id="0", prompt="?"), response=response)
    assert answer_pattern([unlabelled]) == answer_pattern([labelled]), "then the first form that matches"
