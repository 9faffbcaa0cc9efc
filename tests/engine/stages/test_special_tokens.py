"""A student whose special tokens have other names learns with the teacher's tokenizer, and its lineage says so."""

import json
import shutil
from pathlib import Path

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, RolloutInputs, SftInputs, SilentReporter
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import special_differences
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.recipes import PromptingRecipe, RolloutRecipe, RuntimeRecipe, Sampling, SftRecipe
from tests.conftest import EXAMPLES

TEACHER = EXAMPLES / "arithmetic" / "teacher"


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.alerts: dict[str, str] = {}

    def alert(self, code: str, message: str) -> None:
        self.alerts[code] = message


def student(folder: Path, old: str, new: str) -> Path:
    shutil.copytree(EXAMPLES / "arithmetic" / "student", folder / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / "student" / name
        file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
    return folder / "student"


def fine_tuned(folder: Path, model: Path, **prompting: object) -> tuple[Path, Listening]:
    responses = folder / "responses.jsonl"
    responses.write_text("".join(json.dumps({"prompt": f"{n}+1=?", "response": f"#{n + 1}"}) + "\n" for n in range(4)))
    claim, reporter = asserted_claim(inspect_model(TEACHER).identity), Listening()
    inputs = SftInputs(student=model, responses=responses, sft_teacher=claim, tokenizer=TEACHER)
    context = Context(RuntimeRecipe(device="cpu"), PromptingRecipe(**prompting), reporter)
    output = folder / f"sft-{len(prompting)}"
    stages.sft(SftRecipe(steps=1, batch_size=2), inputs, output, context)
    return output, reporter


def test_an_unused_special_token_may_have_another_name(tmp_path):
    output, reporter = fine_tuned(tmp_path, student(tmp_path, "<pad>", "<fill>"))
    assert "'<pad>' / '<fill>'" in reporter.alerts["special_tokens_differ"]
    assert read_lineage(output).special_tokens_differ == "0: '<pad>' / '<fill>'"
    assert special_differences(TEACHER, output) == (), "saved with the teacher's tokenizer"


def test_a_used_one_is_refused_or_learnt(tmp_path):
    model = student(tmp_path, "<user>", "<human>")
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*'<user>'.*'<human>'.*use it"):
        fine_tuned(tmp_path, model)
    output, _ = fine_tuned(tmp_path, model, differing_tokens="learn")
    assert "'<user>' / '<human>'" in read_lineage(output).special_tokens_differ


def test_rollouts_of_a_student_that_never_saw_the_token_are_refused(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=?"}\n')
    recipe = RolloutRecipe(sampling=Sampling(max_new_tokens=4), count=1)
    inputs = RolloutInputs(student=student(tmp_path, "<user>", "<human>"), prompts=prompts, tokenizer=TEACHER)
    with pytest.raises(ConsistencyError, match="tokenizer_mismatch"):
        stages.rollout(recipe, inputs, tmp_path / "rollouts", Context(RuntimeRecipe(device="cpu")))
