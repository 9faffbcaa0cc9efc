"""An adapter's directory in peft's format, by its files alone: what it holds, its scale, and its base model."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from opd_mcp.identity.files import read_json_object
from opd_mcp.identity.safetensors import UNSAFE_SUFFIXES, file_metadata, read_tensors
from opd_mcp.schemas.errors import IntegrityError, PathError
from opd_mcp.schemas.identity import ModelIdentity, Quantization

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_IDENTITY = "opd_base_identity"
"""The key of the weights' metadata under which our adapters carry the identity of their base."""
BASE_QUANTIZATION = "opd_base_quantization"
"""The key under which they say that they belong to the dequantised weights of their base."""
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
LAYER_WEIGHT = re.compile(r"\.\d+\.(?:\w+\.)*(?P<name>\w+)\.weight$")
# what an adapter may say without changing what rank, alpha and its tensors compute
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "layer_replication": ([], None),
    # the other ways to begin change the base as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class AdapterFiles:
    """A directory's adapter: rank r, its scale, the layers it belongs to, its number of values, and its base.

    `base` is what the adapter names: a path or a Hub id; `base_identity` is known of adapters that were made here.
    With a `quantization` the adapter belongs to the base's weights as they are quantised and dequantised.
    """

    path: Path
    base: str
    rank: int
    scale: float
    modules: tuple[str, ...]
    parameters: int
    base_identity: ModelIdentity | None = None
    quantization: Quantization | None = None

    def base_directory(self) -> Path:
        """The base's directory; raises PathError `base_missing` where the adapter names none that is here."""
        directory = Path(self.base)
        if not directory.is_absolute() or not directory.is_dir():
            raise base_missing(self)
        return directory


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter rather than a whole model."""
    return (directory / ADAPTER_CONFIG).is_file()


def read_adapter(directory: Path) -> AdapterFiles:
    """The adapter in a directory, unless it computes more than scale · BA.

    Raises PathError `not_a_model`, `unsafe_weights` or `unsupported_adapter`; IntegrityError `damaged_file`.
    """
    _require_alone(directory)
    config = read_json_object(directory / ADAPTER_CONFIG)
    for name, plain in PLAIN.items():
        if config.get(name) not in plain:
            raise unsupported_adapter(directory, f"{name} is {config[name]!r}")
    rank, alpha, base = config.get("r"), config.get("lora_alpha"), config.get("base_model_name_or_path")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not isinstance(base, str):
        raise IntegrityError(
            "damaged_file",
            f"{ADAPTER_CONFIG} says no rank, lora_alpha or base_model_name_or_path.",
            value=directory / ADAPTER_CONFIG,
            fix="Save the adapter again with peft's model.save_pretrained(DIR).",
        )
    return AdapterFiles(
        path=directory,
        base=base,
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        modules=tuple(_modules(directory, rank)),
        parameters=sum(tensor.elements for tensor in read_tensors(directory)),
        base_identity=_base_identity(directory / ADAPTER_WEIGHTS),
        quantization=_base_quantization(directory),
    )


def linear_layers(directory: Path) -> set[str]:
    """The last names of the weights [out, in] in a model's numbered layers, e.g. `q_proj`."""
    found = (LAYER_WEIGHT.search(tensor.name) for tensor in read_tensors(directory) if len(tensor.shape) == 2)
    return {match["name"] for match in found if match}


def base_missing(adapter: AdapterFiles) -> PathError:
    """The error for an adapter whose base is not here."""
    return PathError(
        "base_missing",
        f"The model that this adapter belongs to, {adapter.base[:200]!r}, is not here.",
        value=adapter.path,
        fix=f"Bring the base below an allowed root and write its absolute path into {ADAPTER_CONFIG} as "
        "base_model_name_or_path; a base from the Hub is found once a run has fetched it.",
    )


def unsupported_adapter(directory: Path, why: str) -> PathError:
    """The error for an adapter that is more than scale · BA on linear layers."""
    return PathError(
        "unsupported_adapter",
        f"This adapter cannot be used: {why[:300]}.",
        value=directory,
        fix="Give a LoRA adapter of linear layers without DoRA, biases or other trained modules, or merge it into its "
        "base and give the merged directory.",
    )


def _require_alone(directory: Path) -> None:
    """Raise unless what would be loaded is what is hashed: one file of an adapter's weights, and no model."""
    weights = sorted(file.name for file in directory.glob("*.safetensors"))
    if weights == [ADAPTER_WEIGHTS] and not (directory / "config.json").exists():
        return
    unsafe = sorted(file.name for file in directory.iterdir() if file.suffix in UNSAFE_SUFFIXES)
    if (directory / "config.json").exists():
        code, why = "not_a_model", "This directory holds the configurations of a LoRA adapter and of a whole model."
    elif unsafe and not weights:
        code, why = "unsafe_weights", f"The adapter's weights can run code when loaded, refused unread: {unsafe[:5]}."
    else:
        code, why = "not_a_model", f"This is a LoRA adapter, whose one weights file is not {ADAPTER_WEIGHTS}."
    raise PathError(
        code,
        why,
        value=directory,
        fix=f"Give a directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} alone, as peft's model.save_pretrained(DIR) "
        "writes it, or the model merged.",
    )


def _modules(directory: Path, rank: int) -> Iterator[str]:
    sides: dict[str, set[str]] = {}
    for tensor in read_tensors(directory):
        parts = TENSOR_NAME.fullmatch(tensor.name)
        if parts is None or len(tensor.shape) != 2 or tensor.shape[0 if parts["side"] == "A" else 1] != rank:
            raise unsupported_adapter(directory, f"it holds {tensor.name} {list(tensor.shape)}")
        sides.setdefault(parts["module"], set()).add(parts["side"])
    for module, found in sides.items():
        if found != {"A", "B"}:
            raise unsupported_adapter(directory, f"{module} has only one of its two matrices")
        yield module


def _base_quantization(directory: Path) -> Quantization | None:
    found = file_metadata(directory / ADAPTER_WEIGHTS).get(BASE_QUANTIZATION)
    if found is not None and found not in get_args(Quantization):
        raise unsupported_adapter(directory, f"it belongs to a base that is quantised as {found[:40]!r}")
    return cast("Quantization | None", found)


def _base_identity(weights: Path) -> ModelIdentity | None:
    text = file_metadata(weights).get(BASE_IDENTITY)
    try:
        return None if text is None else ModelIdentity.from_json(text)
    except ValidationError:
        return None  # a hint for finding the base: without it the base is found by its name
