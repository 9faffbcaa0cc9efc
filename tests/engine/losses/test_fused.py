"""The Triton kernel in Triton's interpreter: the same sums and gradients as plain torch, whatever the shape."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_mcp.engine.losses.linear_head import LossRows, one_pass_losses, row_scores
from opd_mcp.engine.losses.logit_tiles import Head, exponentials, kernel_problem
from opd_mcp.engine.losses.objectives import CrossEntropy, RowObjective, Sampled, TopkForwardKl, TopkReverseKl

pytest.importorskip("triton", reason="make test-extras: Triton is not installed")
from opd_mcp.engine.losses import fused

pytestmark = pytest.mark.needs("triton")

R, H, K, CLIP = 6, 12, 3, 0.7
OBJECTIVES: dict[str, RowObjective] = {
    "cross_entropy": CrossEntropy(),
    "sampled": Sampled(CLIP),
    "topk_reverse_kl": TopkReverseKl(K),
    "topk_forward_kl": TopkForwardKl(K),
}


def random_logits(rows: int, vocab: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V], distinct ids [R, K], targets [R]."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocab, generator=generator)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:K] for _ in range(rows)])
    return logits, ids, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("vocab", [K + 1, 61, fused.BLOCK - 1, fused.BLOCK, 2 * fused.BLOCK + 5])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 40.0])
def test_the_kernel_s_tile_equals_plain_torch_s(vocab: int, softcap: float | None, spread: float) -> None:
    logits, ids, targets = random_logits(R, vocab, spread)
    head = Head(torch.zeros(vocab, H), None, softcap)
    plain = exponentials(replace(head, kernel=False, weight=head.weight.double()), logits.double(), ids, targets)
    ours = exponentials(replace(head, kernel=True), logits.clone(), ids, targets)
    torch.testing.assert_close(ours.values.double(), plain.values, rtol=2e-4, atol=1e-7)
    assert (ours.values.gather(1, ids) == 0).all()
    for name in ("own", "rest", "target", "total"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(plain, name), rtol=1e-4, atol=2e-5)
    if softcap is not None:
        torch.testing.assert_close(ours.slope.double(), plain.slope, rtol=1e-4, atol=2e-6)


def test_the_greatest_logit_may_be_an_id_or_lie_in_any_block() -> None:
    logits, ids, targets = random_logits(4, 2 * fused.BLOCK, 1.0)
    logits[0, ids[0, 0]] = 200.0
    logits[1, 0], logits[2, fused.BLOCK], logits[3, -1] = 150.0, 150.0, 150.0
    head = Head(torch.zeros(logits.shape[1], H))
    plain = exponentials(replace(head, kernel=False, weight=head.weight.double()), logits.double(), ids, targets)
    ours = exponentials(replace(head, kernel=True), logits.clone(), ids, targets)
    torch.testing.assert_close(ours.own.double(), plain.own, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.values.double(), plain.values, rtol=1e-5, atol=1e-30)


def test_values_can_be_written_in_the_operands_dtype_beside_the_logits() -> None:
    logits, _, _ = random_logits(R, 500, 2.0)
    floors, before = logits.amax(dim=1) - 1, logits.clone()
    values = torch.empty(R, 500, dtype=torch.bfloat16)
    sums = fused.row_sums(logits, floors, values=values)
    exact = (logits.double() - logits.double().amax(dim=1, keepdim=True)).exp()
    assert (logits == before).all(), "the logits are only read"
    torch.testing.assert_close(sums.outside.double()[:, 0], exact.sum(dim=1), rtol=1e-6, atol=0)
    # the interpreter cuts bf16 off where the device rounds to the nearest: tools/gpu/check.py holds it to 2⁻⁸
    torch.testing.assert_close(values.double(), exact, rtol=2**-7, atol=0)
    assert (values[exact == 1] == 1).all(), "the likeliest token's exponential is exact in bf16"


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_equal_autograd_in_float64(
    name: str, with_bias: bool, softcap: float | None, plain_losses: Callable[..., Tensor]
) -> None:
    vocab = fused.BLOCK + 61
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(R, H, generator=generator), torch.randn(vocab, H, generator=generator)
    bias = torch.linspace(-1, 1, vocab) if with_bias else None
    targets, row_weights = torch.randint(vocab, (R,), generator=generator), torch.rand(R, generator=generator)
    teacher = torch.log_softmax(2 * torch.randn(R, vocab, generator=generator), dim=-1)
    top = teacher.topk(K, dim=-1)
    columns = {
        "teacher_logprobs": teacher.gather(1, targets[:, None])[:, 0],
        "topk_ids": top.indices,
        "topk_logprobs": top.values,
    }
    wide = [t.double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = wide[0] @ wide[1].T + (wide[2] if with_bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    stored = {n: v.double() if v.is_floating_point() else v for n, v in columns.items()}
    plain = (plain_losses(name, logits, targets, stored, CLIP) * row_weights).sum()
    expected = torch.autograd.grad(plain, wide)

    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    head = Head(weight, bias, softcap, kernel=True)
    two_rows = 2 * vocab * 4
    ours = one_pass_losses(head, hidden, LossRows(targets, row_weights, columns), OBJECTIVES[name], tile_bytes=two_rows)
    assert ours.total.item() == pytest.approx(plain.item(), rel=1e-5)
    for gradient, reference in zip(torch.autograd.grad(ours.total, leaves), expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scores_and_top_k_equal_plain_torch_s(softcap: float | None) -> None:
    vocab = fused.BLOCK + 7
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(R, H, generator=generator), torch.randn(vocab, H, generator=generator)
    targets = torch.randint(vocab, (R,), generator=generator)
    head = Head(weight, None, softcap)
    plain = row_scores(replace(head, kernel=False), hidden, targets, topk=K, valid_vocab=vocab - 9)
    ours = row_scores(replace(head, kernel=True), hidden, targets, topk=K, valid_vocab=vocab - 9)
    assert (ours.topk_ids == plain.topk_ids).all()
    torch.testing.assert_close(ours.logprobs, plain.logprobs, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(ours.topk_logprobs, plain.topk_logprobs, rtol=1e-6, atol=2e-5)


def test_an_empty_tile_launches_nothing() -> None:
    sums = fused.row_sums(torch.empty(0, 10), torch.empty(0))
    assert sums.greatest.shape == (0, 1)


def test_the_kernel_is_tried_before_it_is_used() -> None:
    assert kernel_problem(torch.device("cpu")) is None
    on_cuda = kernel_problem(torch.device("cuda", 0))
    assert torch.cuda.is_available() or on_cuda.startswith("Triton cannot build it here (")


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from opd_mcp.engine.losses.fused import BLOCK, WARPS, _row_kernel

found = []
for values in ("*fp32", "*bf16"):
    for capped in (False, True):
        for writes in (False, True):
            constants = {"VOCAB": 151936, "CAPPED": capped, "WRITES": writes, "BLOCK": BLOCK}
            signature = dict.fromkeys(("logits", "floors", "greatest_of", "outside_of"), "*fp32")
            signature |= {"values": values, "row_stride": "i32", "value_stride": "i32", "softcap": "fp32"}
            source = ASTSource(_row_kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
            for capability in (80, 90):
                target = GPUTarget("cuda", capability, 32)
                code = triton.compile(source, target=target, options={"num_warps": WARPS}).asm
                found.append([values, writes, len(code["cubin"]), "cvt.rn.bf16" in code["ptx"]])
print(json.dumps(found))
"""


def test_the_kernel_compiles_for_ampere_and_hopper_without_a_gpu() -> None:
    """Machine code for every variant; bf16 values are rounded to the nearest there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 16
    for values, writes, size, rounds in found:
        assert size > 1000
        assert rounds == (values == "*bf16" and writes)
