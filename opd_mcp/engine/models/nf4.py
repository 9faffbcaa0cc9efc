"""4-bit weights in the data type NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E).

A block of 64 values is held as 4-bit indices into a table of 16 levels, and the float32 absmax of the block: 4.5 bits
per weight. The absmax values are not quantised a second time: that would save 0.37 bits per weight (0.3 GB of an 8B
model) and round twice. Codes and scales lie as bitsandbytes lays them out, so its CUDA kernel reads them.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero."""
BLOCK = 64
# values that are widened at a time: bounds the float32 copies next to the weight that is asked for
CHUNK = 1 << 24


@torch.no_grad()
def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B · 32] and absmax float32 [B] of a weight's values in row order, in B blocks of 64.

    Two codes share a byte, the first in its upper half. The last block is filled with zeros.
    """
    flat = weight.detach().flatten()
    blocks = -(-flat.numel() // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    for first in range(0, blocks, CHUNK // BLOCK):
        part = slice(first, min(first + CHUNK // BLOCK, blocks))
        values = flat[part.start * BLOCK : part.stop * BLOCK].float()
        rows = pad(values, (0, (part.stop - part.start) * BLOCK - values.numel())).view(-1, BLOCK)
        absmax[part] = rows.abs().amax(dim=1)
        scaled = rows / absmax[part, None].clamp_min(torch.finfo(torch.float32).tiny)
        nearest = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8).flatten()
        codes[part.start * BLOCK // 2 : part.stop * BLOCK // 2] = (nearest[::2] << 4) | nearest[1::2]
    return codes, absmax


@torch.no_grad()
def dequantised(codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of this shape: level · absmax in float32, rounded to `dtype`. The reference of every kernel."""
    pairs = _pairs(codes.device)
    weight = torch.empty(absmax.numel(), BLOCK, dtype=dtype, device=codes.device)
    for first in range(0, absmax.numel(), CHUNK // BLOCK):
        part = slice(first, min(first + CHUNK // BLOCK, absmax.numel()))
        bytes_ = codes[part.start * BLOCK // 2 : part.stop * BLOCK // 2]
        weight[part] = pairs.index_select(0, bytes_.int()).view(-1, BLOCK) * absmax[part, None]
    return weight.flatten()[: prod(shape)].view(*shape)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels [256, 2] that each byte of codes stands for."""
    levels = torch.tensor(LEVELS, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


Dequantise = Callable[[Tensor, Tensor, Sequence[int], torch.dtype], Tensor]


def _by_bitsandbytes(codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, BLOCK, "nf4", list(shape), dtype)
    return weight


@cache
def _kernel(device: torch.device) -> tuple[str, Dequantise]:
    """The name of what dequantises on a device, and the function: bitsandbytes' kernel on CUDA, if it computes this."""
    reference = f"torch {torch.__version__}", dequantised
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        return reference
    try:
        import_module("bitsandbytes")  # registers its operations
        trial = torch.randn(96, 128, device=device, generator=torch.Generator(device).manual_seed(0))
        codes, absmax = quantised(trial)
        for dtype in (torch.bfloat16, torch.float32):
            found, expected = (f(codes, absmax, trial.shape, dtype) for f in (_by_bitsandbytes, dequantised))
            # an unrounded product of the same two factors may differ in its last place
            if not torch.allclose(found.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=0):
                return reference
    except Exception:  # a build for another CUDA raises many kinds; the reference computes the same
        return reference
    return f"bitsandbytes {version('bitsandbytes')}", _by_bitsandbytes


def kernel_name(device: torch.device) -> str:
    """What dequantises on this device, with its version, for lineages."""
    return _kernel(device)[0]


# Operations of their own, so that a compiler neither looks inside nor keeps the dequantised weight for the backward.
@torch.library.custom_op("opd_mcp::nf4_product", mutates_args=())
def nf4_product(input: Tensor, codes: Tensor, absmax: Tensor, rows: int) -> Tensor:
    """x Wᵀ [..., rows] of x [..., columns], in x's dtype; the dequantised W is freed at once."""
    weight = _kernel(codes.device)[1](codes, absmax, (rows, input.shape[-1]), input.dtype)
    return linear(input, weight)


@torch.library.custom_op("opd_mcp::nf4_product_backward", mutates_args=())
def nf4_product_backward(upstream: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> Tensor:
    """The gradient [..., columns] of the input, with W dequantised again."""
    return upstream @ _kernel(codes.device)[1](codes, absmax, (upstream.shape[-1], columns), upstream.dtype)


@nf4_product.register_fake
def _product_shape(input: Tensor, codes: Tensor, absmax: Tensor, rows: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], rows)


@nf4_product_backward.register_fake
def _gradient_shape(upstream: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> Tensor:
    return upstream.new_empty(*upstream.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.columns = inputs[0].shape[-1]


def _input_gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
    return nf4_product_backward(upstream, *ctx.saved_tensors, ctx.columns), None, None, None


nf4_product.register_autograd(_input_gradient, setup_context=_keep)


class Nf4Weight(nn.Module):
    """A frozen weight [out, in] in NF4; `dtype` is what it was quantised from."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, absmax = quantised(weight)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.shape, self.dtype = weight.shape, weight.dtype

    @property
    def bytes_held(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Weight":
        absmax = self.absmax
        super()._apply(fn, recurse)
        self.absmax = absmax.to(self.codes.device)  # a cast of the model must not round the scales
        return self

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b [..., out] of x [..., in]; under autocast in its dtype, as a plain linear layer computes."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output: Tensor = nf4_product(input, self.codes, self.absmax, self.shape[0])
        return output if bias is None else output + bias.to(output.dtype)

    def dequantised(self) -> Tensor:
        """The weight [out, in] that products are formed with, float32."""
        return dequantised(self.codes, self.absmax, self.shape, torch.float32)


class Nf4Linear(nn.Module):
    """A linear layer whose frozen weight is in NF4."""

    def __init__(self, base: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.packed = Nf4Weight(base.weight.to(device))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        return self.packed.product(input, self.bias)


def packed_weights(model: nn.Module) -> list[Nf4Weight]:
    """The model's weights in NF4."""
    return [module for module in model.modules() if isinstance(module, Nf4Weight)]


def weight_count(model: nn.Module) -> int:
    """The model's weights, each of a 4-bit block counted as one."""
    packed = sum(prod(weight.shape) for weight in packed_weights(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def weight_bytes_held(model: nn.Module) -> int:
    """Bytes of the model's weights as they are held."""
    packed = sum(weight.bytes_held for weight in packed_weights(model))
    return packed + sum(parameter.nbytes for parameter in model.parameters())
