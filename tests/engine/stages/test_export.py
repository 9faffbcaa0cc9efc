"""Exports: what is copied, converted, merged and refused, and what the card says and runs."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_mcp.engine import stages
from opd_mcp.engine.context import BenchmarkInputs, Context, ExportInputs, SampleInputs
from opd_mcp.engine.evaluation.card import markdown
from opd_mcp.engine.models.loading import adopt_tokenizer, load_model
from opd_mcp.engine.models.lora import adapters
from opd_mcp.engine.models.saving import SavedForm
from opd_mcp.engine.runtime import Runtime
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.files import file_sha256
from opd_mcp.identity.lineage import read_lineage, verified_lineage, write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.safetensors import read_tensors
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, OpdError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.recipes import AdapterRecipe, ExportRecipe, PromptingRecipe
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import DataOrigin, ModelOrigin

HOSTILE = "![x](http://evil) | <script>\n# owned"


@pytest.fixture
def student(example: Path, tmp_path: Path) -> Path:
    """A student whose lineage says that it was distilled, with a processor file, a licence and files of no model."""
    path = Path(shutil.copytree(example / "student", tmp_path / "student"))
    (path / "preprocessor_config.json").write_text('{"for": "others"}')
    (path / "LICENSE").write_text("of the first weights")
    (path / "training.json").write_text("{}")
    teacher = inspect_model(example / "teacher").identity
    lineage = Lineage(
        kind="model",
        stage="distill",
        recipe={"distill": {"method": "lightning", "steps": 3}},
        model=inspect_model(path).identity,
        sft_teacher=asserted_claim(teacher),
        distilled_from=teacher,
    )
    write_lineage(path, lineage)
    return path


@pytest.fixture
def adapted(example: Path, tmp_path: Path) -> Path:
    """A student saved merged and, in `adapter/`, as the adapter that was trained."""
    loaded = load_model(
        example / "student",
        Runtime(torch.device("cpu"), torch.float32, 0),
        for_training=True,
        adapter=AdapterRecipe(rank=2),
    )
    generator = torch.Generator().manual_seed(0)
    for layer in adapters(loaded.model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 1e-4
    adopted = adopt_tokenizer(example / "student", PromptingRecipe())
    SavedForm.of(loaded, adopted, "input", "both").save(loaded.model, tmp_path / "adapted")
    return tmp_path / "adapted"


def exported(model: Path, output: Path, **settings: object) -> Path:
    inputs = settings.pop("inputs", ExportInputs(model=model))
    stages.export(ExportRecipe(**settings), inputs, output, Context())
    return output


def dtypes(model: Path) -> set[str]:
    return {tensor.dtype for tensor in read_tensors(model)}


def test_an_export_as_stored_is_a_copy_of_the_models_files_alone_and_keeps_its_lineage(student, tmp_path):
    output = exported(student, tmp_path / "export")
    assert (output / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    more = {"preprocessor_config.json", "LICENSE", "model.safetensors", "lineage.json", "README.md"}
    assert {file.name for file in output.iterdir()} == names | more
    lineage, before = verified_lineage(output, full=True), verified_lineage(student)
    assert lineage.stage == "export"
    assert lineage.sft_teacher == before.sft_teacher
    assert lineage.distilled_from == before.distilled_from
    assert lineage.model.weights == before.model.weights
    assert lineage.recipe["distill"] == before.recipe["distill"]


def test_a_converted_export_is_in_shards_of_the_asked_dtype_and_transformers_loads_it(student, tmp_path):
    output = exported(student, tmp_path / "export", format="bfloat16", shard_bytes=60_000)
    assert dtypes(output) == {"BF16"}
    assert len(list(output.glob("model-*.safetensors"))) > 1
    expected = load_file(student / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(output, local_files_only=True).state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert verified_lineage(output, full=True).parents[0].identity.weights == inspect_model(student).identity.weights
    back = exported(output, tmp_path / "again", format="float32")
    assert dtypes(back) == {"F32"}
    assert len(list(back.glob("*.safetensors"))) == 1


def test_large_files_are_cut_into_shards_without_another_change(student, tmp_path):
    output = exported(student, tmp_path / "export", shard_bytes=60_000)
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert inspect_model(output).identity.weights == inspect_model(student).identity.weights


def test_an_adapter_is_exported_alone_or_merged_and_bfloat16_that_loses_it_is_refused(adapted, student, tmp_path):
    alone = exported(adapted, tmp_path / "alone", format="adapter")
    assert {file.name for file in alone.glob("adapter_*")} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "enable-lora --max-lora-rank 2 --lora-modules alone=." in (alone / "README.md").read_text()
    merged = exported(alone, tmp_path / "merged")
    assert dtypes(merged) == {"F32"}
    whole, found = load_file(adapted / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    with pytest.raises(ArgumentError, match=r"lossy_precision.*rounding would lose"):
        exported(alone, tmp_path / "narrow", format="bfloat16")
    with pytest.raises(ConsistencyError, match="no_adapter"):
        exported(student, tmp_path / "none", format="adapter")


def test_an_exported_model_answers_and_is_measured_as_any_other(student, example, tmp_path):
    output = exported(student, tmp_path / "export", format="float32")
    recipe = resolve_recipe("demo", {"benchmark.samples_per_prompt": 0, "benchmark.kl_prompts": 1})
    context = Context(recipe.runtime, recipe.prompting)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=?", "answer": "2"}\n')
    stages.sample(
        recipe.sample, SampleInputs(model=output, prompts=tmp_path / "prompts.jsonl"), tmp_path / "s", context
    )
    assert len(json.loads((tmp_path / "s" / "samples.json").read_text())) == 1
    inputs = BenchmarkInputs(models={"distilled": output}, prompts=tmp_path / "prompts.jsonl", recipe_hash="0" * 64)
    report = stages.benchmark(recipe.benchmark, inputs, tmp_path / "report", context)
    card = exported(output, tmp_path / "card", inputs=ExportInputs(model=output, report=tmp_path / "report"))
    accuracy = report.models[0].greedy_accuracy
    figure = f"| distilled | {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] (n = 1) |"
    text = (card / "README.md").read_text()
    assert figure in text
    assert f"**{report.verdict.judgement.replace('_', ' ')}**: {markdown(report.verdict.sentence)}" in text


def output_of_the_cards_code(output: Path, base: Path, monkeypatch, capsys) -> str:
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    file = output.with_suffix(".py")
    file.write_text(code.replace('"BASE"', repr(str(base))))
    monkeypatch.chdir(output)
    capsys.readouterr()
    runpy.run_path(str(file))
    return capsys.readouterr().out


def test_the_cards_first_command_runs_in_the_exported_directory(example, tmp_path, monkeypatch, capsys):
    output = exported(example / "teacher", tmp_path / "export")
    assert output_of_the_cards_code(output, example, monkeypatch, capsys).startswith("1+1=2;")


@pytest.mark.needs("peft")
def test_the_first_command_of_an_adapters_card_runs_on_its_base(adapted, example, tmp_path, monkeypatch, capsys):
    output = exported(adapted, tmp_path / "export", format="adapter")
    assert output_of_the_cards_code(output, example / "student", monkeypatch, capsys)


def test_the_card_inherits_licences_and_shows_foreign_texts_as_they_are(student, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    front = "---\nlicense: other\nlicense_name: ours\nlicense_link: https://example.org/terms\n---\n# Base\n"
    (base / "README.md").write_text(front)
    inputs = ExportInputs(
        model=student,
        models=[
            ModelOrigin(role="teacher", name=HOSTILE),
            ModelOrigin(role="student", name="org/base", path=str(base)),
        ],
        data=[DataOrigin(role="prompts", name=HOSTILE, rows=7, sha256="ab" * 32)],
    )
    card = (exported(student, tmp_path / "export", inputs=inputs) / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    fields = yaml.safe_load(head)
    assert (fields["library_name"], fields["base_model"]) == ("transformers", ["org/base"])
    assert "license" not in fields  # the teacher's is not known
    assert "org/base: license other, license_name ours, license_link https\\://example.org/terms" in body
    assert "7 rows, sha256 abababababab" in body
    assert "arxiv.org/abs/2604.13010" in body
    assert "not measured" in body.lower()
    assert "(asserted)" in body
    assert "<script>" not in re.sub(r"\\.", "", body)
    assert not any(line.startswith("# owned") for line in body.splitlines())
    same = ExportInputs(model=student, models=[ModelOrigin(role="student", name="org/base", path=str(base))])
    card = (exported(student, tmp_path / "same", inputs=same) / "README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert (fields["license"], fields["license_name"]) == ("other", "ours")


def test_a_folders_name_is_one_word_in_the_commands_that_people_copy(student, tmp_path):
    card = (exported(student, tmp_path / "a; touch owned $(id)\n`") / "README.md").read_text()
    served = [line for line in card.splitlines() if line.startswith(("vllm serve", "python -m sglang"))]
    assert [shlex.split(line)[-1] for line in served] == ["a; touch owned $(id)␊`"] * 2


def test_markdown_text_is_one_line_that_adds_no_markup():
    assert markdown("a_b|c\n`d`") == "a\\_b\\|c␊\\`d\\`"


def test_a_gguf_export_is_the_converters_file_with_card_and_lineage(adapted, tmp_path):
    """The converter gets the whole model, an adapter merged; nothing but its file stays."""
    seen = {}

    def convert(model: Path, file: Path) -> None:
        seen["files"] = {path.name for path in model.iterdir()}
        file.write_bytes(b"GGUF" + (model / "model.safetensors").read_bytes())

    alone = exported(adapted, tmp_path / "alone", format="adapter")
    output = tmp_path / "mine"
    context = Context(convert_to_gguf=convert)
    stages.export(ExportRecipe(format="gguf"), ExportInputs(model=alone), output, context)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= seen["files"]
    assert {path.name for path in output.iterdir()} == {"mine.gguf", "README.md", "lineage.json"}
    lineage = read_lineage(output)
    assert lineage.files["mine.gguf"] == file_sha256(output / "mine.gguf")
    assert lineage.model.weights == inspect_model(exported(alone, tmp_path / "merged")).identity.weights
    card = (output / "README.md").read_text()
    assert "llama-server -m mine.gguf" in card
    assert "library_name: gguf" in card
    assert "```python" not in card


@pytest.mark.parametrize(("convert", "code"), [(None, "missing_package"), (b"<html>", "damaged_file")])
def test_no_gguf_without_a_converter_that_writes_one(student, tmp_path, convert, code):
    given = None if convert is None else lambda model, file: file.write_bytes(convert)
    with pytest.raises(OpdError, match=code):
        stages.export(
            ExportRecipe(format="gguf"), ExportInputs(model=student), tmp_path / "x", Context(convert_to_gguf=given)
        )
