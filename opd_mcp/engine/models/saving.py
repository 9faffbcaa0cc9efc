"""Saving a trained student with every file that other tools need, tried out before the training."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from opd_mcp.engine.models.loading import (
    GENERATION_CONFIG,
    AdoptedTokenizer,
    LoadedModel,
    copy_tokenizer,
    load_tokenizer,
)
from opd_mcp.identity.files import read_json_object, write_atomic
from opd_mcp.identity.safetensors import read_tensors
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.recipes import SaveDtype

# What processors and servers read next to weights, configuration and tokenizer.
COMPANION_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SavedForm:
    """How a student is saved: with the files of which original, with which tokenizer, in which dtype.

    A dtype that was not `asked` for never widens weights that training kept narrower.
    """

    original: Path
    adopted: AdoptedTokenizer
    dtype: torch.dtype
    asked: bool

    @classmethod
    def of(cls, student: LoadedModel, adopted: AdoptedTokenizer, dtype: SaveDtype) -> "SavedForm":
        """The form that a recipe's `save_dtype` asks for; "input" is the dtype of most of the original's weights."""
        chosen = input_dtype(student.path) if dtype == "input" else getattr(torch, dtype)
        return cls(student.path, adopted, chosen, asked=dtype != "input")

    def try_out(self, model: PreTrainedModel) -> None:
        """Write everything but the weights to a temporary folder and read it again: no training ends in an error.

        Raises PathError `cannot_be_saved`.
        """
        with TemporaryDirectory(prefix="opd-trial-") as folder:
            trial = Path(folder)
            try:
                self._prepare(model)
                model.config.save_pretrained(trial)
                self._write_companions(trial)
                AutoConfig.from_pretrained(trial, local_files_only=True, trust_remote_code=False)
                GenerationConfig.from_pretrained(trial, local_files_only=True)
                load_tokenizer(trial)
            except Exception as error:  # the libraries raise exceptions of any kind
                raise PathError(
                    "cannot_be_saved",
                    f"A student made of this model could not be saved ({type(error).__name__}: {error}).",
                    value=self.original,
                    fix="Correct the model's configuration and tokenizer files, then start again.",
                ) from error

    def save(self, model: PreTrainedModel, output: Path) -> None:
        """Write the model to `output` as safetensors, with all its files; its weights then have this form's dtype."""
        self._prepare(model)
        cast(model, model.dtype if model.dtype.itemsize < self.dtype.itemsize and not self.asked else self.dtype)
        model.save_pretrained(output)
        self._write_companions(output)

    def _prepare(self, model: PreTrainedModel) -> None:
        model.config.eos_token_id = list(self.adopted.eos_token_ids)
        # The original's may hold settings that are read, but refused when written; its file is copied instead.
        model.generation_config = GenerationConfig(eos_token_id=list(self.adopted.eos_token_ids))

    def _write_companions(self, output: Path) -> None:
        source = self.original / GENERATION_CONFIG
        generation = read_json_object(source) if source.is_file() else {}
        generation["eos_token_id"] = list(self.adopted.eos_token_ids)
        write_atomic(output / GENERATION_CONFIG, json.dumps(generation, indent=2) + "\n")
        copy_tokenizer(self.adopted.path, output)
        for name in COMPANION_FILES:
            if (self.original / name).is_file():
                shutil.copyfile(self.original / name, output / name)


def input_dtype(model: Path) -> torch.dtype:
    """The dtype of most of a model's weights; bfloat16 for one that is narrower than 16 bits."""
    values: dict[str, int] = {}
    for tensor in read_tensors(model):
        values[tensor.dtype] = values.get(tensor.dtype, 0) + tensor.elements
    return DTYPES.get(max(values, key=values.__getitem__), torch.bfloat16)


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the floating-point weights this dtype in place, but for those that their class always keeps in float32."""
    always, saved = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()), set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = not always.isdisjoint(name.split("."))
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if wide else dtype)
