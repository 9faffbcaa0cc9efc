"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x Wᵀ + s · (x Aᵀ) Bᵀ, where W is frozen and A and B are trained.

The adapters of a model are its `LoraLinear` layers, which take the places of linear layers and keep the names of their
weights. Files have peft's format (`identity/adapters.py`); peft itself is not needed.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd_mcp.engine.models.nf4 import Nf4Linear, Nf4Weight, packed_weights
from opd_mcp.engine.runtime import generator_for
from opd_mcp.identity.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_IDENTITY,
    BASE_QUANTIZATION,
    AdapterFiles,
    unsupported_adapter,
)
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, nearest
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import AdapterRecipe


class LoraLinear(nn.Linear):
    """A frozen linear layer with what is added to it: a frozen pair of matrices, a trained pair, or both.

    `lora_A` [r, in] and `lora_B` [out, r] are trained and multiplied by `scale`; `earlier_A`, `earlier_B` are those of
    an adapter that the model came with, its scale in `earlier_B`. All four are float32 (float64 in a float64 model).
    A frozen weight in 4 bits is `packed`, and `weight` is None.
    """

    packed: Nf4Weight | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    earlier_A: Tensor | None
    earlier_B: Tensor | None

    def __init__(self, base: nn.Linear | Nf4Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        if isinstance(base, Nf4Linear):
            self.packed = base.packed
            self.register_parameter("weight", None)
        else:
            self.packed, self.weight = None, base.weight
        self.scale, self.active = 1.0, True
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.register_buffer("earlier_A", None, persistent=False)
        self.register_buffer("earlier_B", None, persistent=False)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of adapters and merged weights."""
        return torch.promote_types((self.weight if self.packed is None else self.packed).dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the frozen weight is."""
        return (self.weight if self.packed is None else self.packed.codes).device

    def frozen(self) -> Tensor:
        """The frozen weight [out, in], dequantised where it is in 4 bits."""
        return self.weight if self.packed is None else self.packed.dequantised()

    def trained(self) -> tuple[nn.Parameter, ...]:
        """A and B where they are trained, or nothing."""
        return () if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def train_pair(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Train these two matrices from their values on."""
        self.lora_A, self.lora_B, self.scale = nn.Parameter(self._placed(a)), nn.Parameter(self._placed(b)), scale

    def add_frozen(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Add the product of these two matrices, untrained."""
        self.earlier_A, self.earlier_B = self._placed(a), self._placed(b) * scale

    def _placed(self, side: Tensor) -> Tensor:
        return side.to(self.device, self.wide)

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out] of inputs [..., in], in the dtype of the frozen layer's."""
        packed = self.packed
        output = linear(input, self.weight, self.bias) if packed is None else packed.product(input, self.bias)
        if not self.active:
            return output
        if self.earlier_A is not None and self.earlier_B is not None:
            output = output + _product(input, self.earlier_A, self.earlier_B)
        if self.lora_A is not None and self.lora_B is not None:
            output = output + _product(input, self.lora_A, self.lora_B) * self.scale
        return output

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What is added to the weight [out, in], float64."""
        total = torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=self.device)
        if self.earlier_A is not None and self.earlier_B is not None:
            total += self.earlier_B.double() @ self.earlier_A.double()
        if self.lora_A is not None and self.lora_B is not None:
            total += self.scale * (self.lora_B.double() @ self.lora_A.double())
        return total

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight [out, in] that computes the same without an adapter, float32 (or float64)."""
        return (self.frozen().double() + self.delta()).to(self.wide)

    @torch.no_grad()
    def pair(self, scale: float) -> tuple[Tensor, Tensor]:
        """One pair of matrices with scale · BA = everything that is added; `earlier` ones become further ranks."""
        sides: list[tuple[Tensor, Tensor]] = []
        if self.lora_A is not None and self.lora_B is not None:
            sides.append((self.lora_A, self.lora_B))
        assert not sides or scale == self.scale, "the trained pair is saved as it is"
        if self.earlier_A is not None and self.earlier_B is not None:
            sides.append((self.earlier_A, self.earlier_B / scale))
        return torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1)


def _product(input: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # a no-op in float32 and under autocast, which casts anyway; a bf16 model in inference has float32 adapters
    return linear(linear(input, a.to(input.dtype)), b.to(input.dtype))


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's adapters by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def freeze(model: nn.Module) -> None:
    """Train none of the model's present weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def add_adapter(model: PreTrainedModel, recipe: AdapterRecipe, seed: int) -> None:
    """Freeze the model, and train an adapter that starts at zero; its random stream follows from the seed.

    Raises ArgumentError `invalid_argument` for targets that no layer has, or that are fused experts.
    """
    targets = target_names(model, recipe.targets)
    freeze(model)
    generator = generator_for(seed, "adapter")
    for name in targets:
        layer = _lora(model, name)
        shape = (recipe.rank, layer.in_features)
        if recipe.init == "gaussian":
            a = torch.randn(shape, generator=generator, dtype=torch.float64) / recipe.rank
        else:  # kaiming_uniform with a = √5, as nn.Linear and peft begin
            a = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(layer.in_features)
        layer.train_pair(a, torch.zeros(layer.out_features, recipe.rank), recipe.scale)


def quantise(model: PreTrainedModel, device: torch.device) -> None:
    """Freeze the model and hold the linear layers of its decoder layers in NF4, quantised one by one on the device.

    Embeddings, norms, the head and fused experts stay as they are.
    """
    freeze(model)
    for name, layer in _linears(model).items():
        assert type(layer) is nn.Linear, "a model is quantised before it gets adapters"
        _replace(model, name, Nf4Linear(layer, device))


def renew_adapter(model: PreTrainedModel, recipe: AdapterRecipe, seed: int) -> None:
    """Take off the adapter that was trained, and train another one from zero on the same frozen model.

    Raises as `add_adapter`.
    """
    for layer in adapters(model).values():
        layer.lora_A = layer.lora_B = None
    add_adapter(model, recipe, seed)


def load_adapter(model: PreTrainedModel, files: AdapterFiles, *, trained: bool = False) -> None:
    """Add a saved adapter to its base, frozen with it or to be trained on.

    Raises PathError `unsupported_adapter` for layers that the model does not have.
    """
    tensors = load_file(files.path / ADAPTER_WEIGHTS)
    linears = _linears(model)
    freeze(model)
    for name in files.modules:
        if name not in linears:
            raise unsupported_adapter(files.path, f"the base has no linear layer {name}")
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        layer = linears[name]
        if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise unsupported_adapter(files.path, f"{name} of the base has another shape")
        lora = _lora(model, name)
        (lora.train_pair if trained else lora.add_frozen)(a, b, files.scale)


def require_continuable(files: AdapterFiles | None, recipe: AdapterRecipe, student: Path) -> AdapterFiles:
    """The adapter that a student is, with the recipe's rank and scale.

    Raises ConsistencyError `no_adapter` for a whole model, ArgumentError `invalid_argument` for other settings.
    """
    if files is None:
        raise ConsistencyError(
            "no_adapter",
            "There is no adapter to continue: the student is a whole model.",
            value=student,
            fix="Give a student saved as an adapter (sft.adapter.save='adapter'), or set continue_adapter to false.",
        )
    if files.rank != recipe.rank or not math.isclose(files.scale, recipe.scale, rel_tol=1e-9):
        raise ArgumentError(
            "invalid_argument",
            f"The adapter to continue has rank {files.rank} and scale {files.scale:g}, the recipe rank {recipe.rank} "
            f"and scale {recipe.scale:g}.",
            value=student,
            fix=f"Set rank to {files.rank} and alpha to {files.scale * files.rank:g} in 'distill.adapter' (or "
            "'sft.adapter').",
        )
    return files


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does in inference: earlier, frozen adapters are off as well."""
    layers, was_training = list(adapters(model).values()), model.training
    before = [layer.active for layer in layers]
    model.eval()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        model.train(was_training)
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put what is added into the weights, float32 or wider, and take the adapters off; all weights can be trained.

    4-bit weights become the dequantised ones, to which what is added belongs, not what they were quantised from.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear | Nf4Linear)]
    for name, layer in layers:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = layer.merged() if isinstance(layer, LoraLinear) else layer.packed.dequantised()
        plain.weight, plain.bias = nn.Parameter(weight), layer.bias
        plain.train(layer.training)
        _replace(model, name, plain)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@torch.no_grad()
def lost_by_merging(model: nn.Module, dtype: torch.dtype) -> float:
    """‖what rounding the merged weights to `dtype` changes‖ / ‖what the adapters add‖, over all layers; 0.0 for none.

    What the frozen weights themselves lose by such rounding counts as well.
    """
    lost = total = 0.0
    for layer in adapters(model).values():
        delta = layer.delta()
        exact = layer.frozen().double() + delta
        lost += float((exact.to(layer.wide).to(dtype).double() - exact).square().sum())
        total += float(delta.square().sum())
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            exact = module.packed.dequantised()
            lost += float((exact.to(dtype).double() - exact).square().sum())
    return math.sqrt(lost / total) if total else 0.0


def save_adapter(model: nn.Module, output: Path, base: Path, identity: ModelIdentity) -> None:
    """Write the adapter as peft reads it; `identity` is that of the base, by which it is found when it has moved."""
    found = {name: layer for name, layer in adapters(model).items() if layer.trained() or layer.earlier_A is not None}
    scale = next((layer.scale for layer in found.values() if layer.lora_A is not None), 1.0)
    pairs = {name: layer.pair(scale) for name, layer in found.items()}
    rank = max(len(a) for a, _ in pairs.values())
    output.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():  # a layer with fewer ranks gets zeros
        more = rank - len(a)
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).float().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b, (0, more)).float().cpu()
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", BASE_IDENTITY: identity.to_json()}
    if packed_weights(model):
        metadata[BASE_QUANTIZATION] = "nf4"
    save_file(contiguous, output / ADAPTER_WEIGHTS, metadata)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _target_modules(model, list(found)),
        "use_dora": False,
        "use_rslora": False,
    }
    write_atomic(output / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def target_names(model: PreTrainedModel, targets: list[str] | None) -> list[str]:
    """The names of the linear layers that get an adapter, in the model's order.

    Raises ArgumentError `invalid_argument`: for targets that no decoder layer has, and for experts that are one fused
    parameter, which have no adapter here.
    """
    linears = _linears(model)
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "experts" in name]
    asked = set(targets or [])
    names = [name for name in linears if targets is None or _last(name) in asked]
    missing = sorted(asked - {_last(name) for name in linears})
    known = sorted({_last(name) for name in linears})
    experts = sorted({_last(name) for name in fused})
    if experts and (targets is None or asked & set(experts)):
        raise ArgumentError(
            "invalid_argument",
            f"The experts of this model are fused parameters ({', '.join(experts)}), which have no adapter here.",
            value=f"adapter.targets={targets}",
            fix=f"Name the linear layers that get one, of {known}; the experts then stay as they are.",
        )
    if missing or not names:
        raise ArgumentError(
            "invalid_argument",
            f"No linear layer of the decoder is called {', '.join(missing)}."
            if missing
            else "The decoder has no linear layers.",
            value=f"adapter.targets={targets}",
            nearest=[close for name in missing for close in nearest(name, known)],
            fix=f"Name some of {known}, or leave the targets out for all of them.",
        )
    return names


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear | Nf4Linear]:
    """The linear layers of the decoder's layers by name."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = {name for name, module in decoder.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    found = {}
    for name, module in decoder.named_modules():
        inside = not layers or any(name.startswith(f"{layer}.") for layer in layers)
        if inside and (type(module) in (nn.Linear, LoraLinear) or isinstance(module, Nf4Linear)):
            found[f"{prefix}.{name}" if prefix else name] = module
    return found


def _lora(model: nn.Module, name: str) -> LoraLinear:
    """The adapter of this name, put in the linear layer's place where there is none yet."""
    layer = model.get_submodule(name)
    if isinstance(layer, LoraLinear):
        return layer
    assert isinstance(layer, nn.Linear | Nf4Linear), "a linear layer gets an adapter"
    lora = LoraLinear(layer)
    lora.train(layer.training)
    _replace(model, name, lora)
    return lora


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """What peft finds exactly these layers by: their last names, or their whole ones where others share the last."""
    last = sorted({_last(name) for name in names})
    alike = [name for name, _ in model.named_modules() if _last(name) in last]
    return last if len(alike) == len(names) else names


def _last(name: str) -> str:
    return name.rpartition(".")[2]
