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
    MODEL_FILES,
    AdoptedTokenizer,
    LoadedModel,
    cast,
    copy_tokenizer,
    load_tokenizer,
    stored_dtype,
)
from opd_mcp.engine.models.lora import lost_by_merging, merge, save_adapter
from opd_mcp.identity.adapters import ADAPTER_WEIGHTS
from opd_mcp.identity.files import read_json_object, write_atomic
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.recipes import AdapterSave, SaveDtype

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
MOST_LOST = 0.01
"""The share of what an adapter adds that rounding may take when it is merged."""
ADAPTER_FOLDER = "adapter"
"""Where a merged student also has its adapter."""


@dataclass(frozen=True)
class SavedForm:
    """How a student is saved: with the files of which original, with which tokenizer, in which dtype.

    A dtype that was not `asked` for never widens weights that training kept narrower. `adapter` says in which ways a
    student with an adapter is saved, which belongs to the weights in `base`; no file of weights has more than
    `shard_bytes`, where that is said.
    """

    original: Path
    adopted: AdoptedTokenizer
    dtype: torch.dtype
    asked: bool
    adapter: AdapterSave | None = None
    base: Path | None = None
    shard_bytes: int | None = None

    @classmethod
    def of(
        cls,
        student: LoadedModel,
        adopted: AdoptedTokenizer,
        dtype: SaveDtype,
        adapter: AdapterSave | None = None,
        shard_bytes: int | None = None,
    ) -> "SavedForm":
        """The form that a recipe's `save_dtype` asks for; "input" is the dtype of most of the original's weights."""
        base = student.facts.weights_path
        chosen = stored_dtype(base) if dtype == "input" else getattr(torch, dtype)
        return cls(student.path, adopted, chosen, dtype != "input", adapter, base, shard_bytes)

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

    def save(self, model: PreTrainedModel, output: Path) -> str | None:
        """Write the model to `output` as safetensors, with all its files; its weights then have this form's dtype.

        With an adapter: the adapter, or the merged model, which may have the adapter in a folder of its own. Merging is
        done in float32. The answer is why a narrower dtype was refused, if it was.
        """
        self._prepare(model)
        if self.adapter is not None:
            return self._save_adapter(model, output, self.adapter)
        cast(model, model.dtype if model.dtype.itemsize < self.dtype.itemsize and not self.asked else self.dtype)
        self._write_weights(model, output)
        self._write_companions(output)
        return None

    def save_copy(self, model: PreTrainedModel, output: Path) -> None:
        """Write a model without an adapter as it is, for others to read while it is trained on."""
        self._prepare(model)
        self._write_weights(model, output)
        self._write_companions(output)

    def _save_adapter(self, model: PreTrainedModel, output: Path, ways: AdapterSave) -> str | None:
        assert self.base is not None, "an adapter belongs to a base"
        if ways != "merged":
            alone = output if ways == "adapter" else output / ADAPTER_FOLDER
            save_adapter(model, alone, self.base, inspect_model(self.base).identity)
            self._write_companions(alone)
        if ways == "adapter":
            return None
        model.to("cpu")  # a merged model may be twice as wide as what fitted the device
        refused, dtype = None, self.dtype if self.asked else torch.float32
        if dtype is not torch.float32 and (share := lost_by_merging(model, dtype)) > MOST_LOST:
            refused = (
                f"Merging into {str(dtype).removeprefix('torch.')} is refused: rounding would lose {share:.1%} of what "
                f"the adapter adds, more than {MOST_LOST:.0%}. The student is saved in float32."
            )
            dtype = torch.float32
        merge(model)
        cast(model, dtype)
        self._write_weights(model, output)
        self._write_companions(output)
        return refused

    def _write_weights(self, model: PreTrainedModel, output: Path) -> None:
        limit = {} if self.shard_bytes is None else {"max_shard_size": self.shard_bytes}
        model.save_pretrained(output, **limit)

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


def saved_files(output: Path) -> list[str]:
    """The files of a saved student that its lineage proves by their hashes; weights and tokenizer have other hashes."""
    return [name for name in (*MODEL_FILES, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}") if (output / name).is_file()]
