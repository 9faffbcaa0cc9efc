"""A model for use elsewhere: safetensors in the asked dtype, tokenizer and processor files, lineage and model card."""

import shutil
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from opd_mcp.engine.context import Context, ExportInputs, counter, require_going
from opd_mcp.engine.evaluation.card import Card, model_card
from opd_mcp.engine.models.loading import MODEL_FILES, adopt_tokenizer, copy_tokenizer, load_model, stored_dtype
from opd_mcp.engine.models.saving import ADAPTER_FOLDER, COMPANION_FILES, SavedForm, saved_files
from opd_mcp.engine.provenance import RECORDED_PACKAGES, claim_of, full_identity, stage_cost
from opd_mcp.engine.runtime import Runtime
from opd_mcp.identity.adapters import ADAPTER_CONFIG, is_adapter
from opd_mcp.identity.files import read_json_object, write_atomic
from opd_mcp.identity.lineage import data_hashes, verified_lineage, write_lineage
from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.identity.safetensors import read_tensors
from opd_mcp.identity.tokenizers import chat_template
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, IntegrityError, converter_missing
from opd_mcp.schemas.identity import Lineage, Parent
from opd_mcp.schemas.recipes import ExportRecipe
from opd_mcp.schemas.reports import BenchmarkReport, StageCost

CARD_FILE = "README.md"
REPORT_FILE = "report.json"
SOURCE_FOLDER = ".source"
"""Where the files are from which a GGUF file is made."""
GGUF_MAGIC = b"GGUF"
AS_STORED = ("input", "gguf")
STORED_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def export(section: ExportRecipe, inputs: ExportInputs, output: Path, context: Context) -> StageCost:
    """Fill `output` with the model: its files where they are in the asked form already, else converted on the CPU.

    As GGUF it is one file next to the card. Raises ConsistencyError `no_adapter`, ResourceError `missing_package`
    without a converter, ArgumentError `lossy_precision` where merging into bfloat16 would lose what the adapter adds,
    IntegrityError `lineage_mismatch`.
    """
    started = time.perf_counter()
    claim = claim_of(inputs.model, None, context)
    source, facts = verified_lineage(inputs.model), inspect_model(inputs.model)
    output.mkdir(parents=True, exist_ok=True)
    whole = output / SOURCE_FOLDER if section.format == "gguf" else output
    whole.mkdir(exist_ok=True)
    if section.format == "adapter":
        _copy(_adapter_of(facts), whole, context)
    elif _is_ready(facts, section):
        _copy(facts.path, whole, context)
    else:
        _convert(facts, section, whole, context)
    require_going(context)
    identity, dtype, chat = full_identity(whole), str(stored_dtype(whole)), chat_template(whole) is not None
    gguf = _gguf(whole, output, context) if section.format == "gguf" else None
    lineage = Lineage(
        kind="model",
        stage="export",
        recipe={**(source.recipe if source else {}), "export": section.to_dict()},
        model=identity,
        sft_teacher=claim,
        distilled_from=source.distilled_from if source else None,
        adapter=source.adapter if source else None,
        teacher_mismatch_allowed=source.teacher_mismatch_allowed if source else False,
        special_tokens_differ=source.special_tokens_differ if source else None,
        parents=[Parent(role="exported", identity=facts.identity), *(source.parents if source else [])],
        files=data_hashes(output, [gguf] if gguf else saved_files(output)),
        versions={name: version(name) for name in RECORDED_PACKAGES if find_spec(name.replace("-", "_")) is not None},
        rendered_at=source.rendered_at if source else None,
    )
    write_lineage(output, lineage)
    report = inputs.report / REPORT_FILE if inputs.report else None
    card = Card(
        name=output.name,
        source=source.stage if source else None,
        lineage=lineage,
        dtype=dtype.removeprefix("torch."),
        report=BenchmarkReport.from_json(report.read_bytes()) if report and report.is_file() else None,
        models=inputs.models,
        data=inputs.data,
        chat=chat,
        adapter_rank=read_json_object(output / ADAPTER_CONFIG).get("r") if is_adapter(output) else None,
        gguf=gguf,
    )
    write_atomic(output / CARD_FILE, model_card(card))
    return stage_cost("export", started, 0, torch.device("cpu"))


def _gguf(whole: Path, output: Path, context: Context) -> str:
    """The name of the GGUF file that was written of the whole model, whose directory is then removed."""
    if context.convert_to_gguf is None:
        raise converter_missing()
    file = output / f"{output.name}.gguf"
    context.convert_to_gguf(whole, file)
    with file.open("rb") as written:
        if written.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise IntegrityError(
                "damaged_file",
                "What the converter wrote is no GGUF file.",
                value=file.name,
                fix="Check 'gguf_converter' in settings.toml: it must be llama.cpp's convert_hf_to_gguf.py.",
            )
    shutil.rmtree(whole)
    return file.name


def _adapter_of(facts: ModelFacts) -> Path:
    """The directory of a model's adapter: the model itself, or the folder next to its merged weights."""
    found = facts.path if facts.adapter is not None else facts.path / ADAPTER_FOLDER
    if not is_adapter(found):
        raise ConsistencyError(
            "no_adapter",
            "This model has no adapter of its own.",
            value=facts.path,
            fix="Export it whole, with format='input'.",
        )
    return found


def _is_ready(facts: ModelFacts, section: ExportRecipe) -> bool:
    """Whether a model's own files are what is asked for."""
    if facts.adapter is not None:
        return False
    large = any(file.stat().st_size > section.shard_bytes for file in facts.path.glob("*.safetensors"))
    found = {tensor.dtype for tensor in read_tensors(facts.path)}
    return not large and (section.format in AS_STORED or found == {STORED_NAMES[section.format]})


def _copy(source: Path, output: Path, context: Context) -> None:
    """Copy weights, configurations, tokenizer and companions; nothing else of a directory is a model's."""
    names = [*MODEL_FILES, *COMPANION_FILES, ADAPTER_CONFIG]
    weights = [file.name for pattern in ("*.safetensors", "*.safetensors.index.json") for file in source.glob(pattern)]
    files = [name for name in (*sorted(weights), *names) if (source / name).is_file()]
    copied = counter(context, len(files), "files")
    for number, name in enumerate(files, start=1):
        shutil.copyfile(source / name, output / name)
        copied(number)
    copy_tokenizer(source, output)


def _convert(facts: ModelFacts, section: ExportRecipe, output: Path, context: Context) -> None:
    """Load the model on the CPU, merge its adapter if it is one, and save it; merging is done in float32."""
    assert section.format != "adapter", "an adapter is copied"
    merges, saved = facts.adapter is not None, "input" if section.format == "gguf" else section.format
    dtype = stored_dtype(facts.weights_path) if section.format in AS_STORED else getattr(torch, section.format)
    runtime = Runtime(torch.device("cpu"), torch.float32 if merges else dtype, context.runtime.seed)
    loaded = load_model(facts.path, runtime, compiled=False)
    require_going(context)
    adopted = adopt_tokenizer(facts.path, context.prompting)
    form = SavedForm.of(loaded, adopted, saved, "merged" if merges else None, section.shard_bytes)
    refused = form.save(loaded.model, output)
    if refused is not None:
        raise ArgumentError(
            "lossy_precision",
            refused.partition(" The student")[0],
            value=section.format,
            fix="Export with format='float32', or 'adapter'.",
        )
