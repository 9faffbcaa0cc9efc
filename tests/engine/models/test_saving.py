"""What a saved student holds, and that what cannot be saved is found before any step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, SftInputs, SilentReporter
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model, stored_dtype
from opd_mcp.engine.models.saving import SavedForm
from opd_mcp.engine.runtime import Runtime
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.recipes import PromptingRecipe
from opd_mcp.schemas.resolve import resolve_recipe

SAMPLING = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.95}  # without do_sample: read, but refused when written


@pytest.fixture
def student(example: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(example / "student", tmp_path / "student"))
    (path / "generation_config.json").write_text(json.dumps(SAMPLING))
    (path / "preprocessor_config.json").write_text('{"for": "others"}')
    return path


@pytest.fixture
def narrow(student: Path) -> Path:
    """The same with bfloat16 weights."""
    weights = load_file(student / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, student / "model.safetensors")
    return student


def form_of(path: Path, example: Path, runtime: Runtime, dtype: str = "input") -> tuple[SavedForm, torch.nn.Module]:
    loaded = load_model(path, runtime, for_training=True)
    return SavedForm.of(loaded, adopt_tokenizer(example / "teacher", PromptingRecipe()), dtype), loaded.model


def test_sampling_defaults_do_not_lose_a_training(student, example, tmp_path):
    recipe = resolve_recipe("demo", {"sft.steps": 1, "sft.batch_size": 2})
    inputs = SftInputs(
        student=student, responses=example / "responses" / "teacher.jsonl", tokenizer=example / "teacher"
    )
    stages.sft(recipe.sft, inputs, tmp_path / "sft", Context(recipe.runtime, recipe.prompting))
    saved = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert saved == {**SAMPLING, "eos_token_id": [1]}
    assert (tmp_path / "sft" / "preprocessor_config.json").read_text() == '{"for": "others"}'
    assert (tmp_path / "sft" / "chat_template.jinja").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", local_files_only=True)
    assert model.generation_config.temperature == 0.6


@pytest.mark.parametrize(
    ("choice", "expected"), [("input", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_weights_have_the_dtype_of_the_input_or_of_the_recipe(narrow, example, tmp_path, runtime, choice, expected):
    form, model = form_of(narrow, example, runtime, choice)
    assert stored_dtype(narrow) is torch.bfloat16
    form.save(model, tmp_path / "saved")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()} == {expected}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_weights_that_were_kept_narrower_are_not_widened_unasked(student, example, tmp_path, runtime):
    form, model = form_of(student, example, runtime)
    form.save(model.bfloat16(), tmp_path / "saved")
    assert stored_dtype(tmp_path / "saved") is torch.bfloat16


def test_what_a_class_keeps_in_float32_stays_so(narrow, example, tmp_path, runtime):
    form, model = form_of(narrow, example, runtime)
    model._keep_in_fp32_modules_strict = {"norm"}
    form.save(model, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert weights["model.norm.weight"].dtype is torch.float32
    assert weights["model.embed_tokens.weight"].dtype is torch.bfloat16


def test_what_cannot_be_saved_is_found_before_the_first_step(student, example, tmp_path, runtime):
    form, model = form_of(student, example, runtime)
    form.try_out(model)
    broken = Path(shutil.copytree(example / "teacher", tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(PathError, match="cannot_be_saved"):
        replace(form, adopted=replace(form.adopted, path=broken)).try_out(model)


def test_no_step_is_taken_after_a_failed_trial(student, example, tmp_path, monkeypatch):
    class Watching(SilentReporter):
        def metric(self, step: int, values: dict[str, float]) -> None:
            pytest.fail("a step was taken")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opd_mcp.engine.models.saving.copy_tokenizer", full_disk)
    recipe = resolve_recipe("demo", {"sft.steps": 1})
    data = example / "responses" / "teacher.jsonl"
    inputs = SftInputs(student=student, responses=data, tokenizer=example / "teacher")
    with pytest.raises(PathError, match=r"cannot_be_saved.*No space left"):
        stages.sft(recipe.sft, inputs, tmp_path / "sft", Context(recipe.runtime, recipe.prompting, Watching()))
    assert not (tmp_path / "sft").exists()
