"""The head's kernels on one device: correctness and speed, a part of `check.py`."""

import json
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from opd_mcp.engine.losses.linear_head import LossRows, one_pass_losses, row_scores
from opd_mcp.engine.losses.logit_tiles import Head, exponentials
from opd_mcp.engine.losses.objectives import CrossEntropy, RowObjective, Sampled, TopkForwardKl, TopkReverseKl
from opd_mcp.schemas.memory import TILE_BYTES
from tools.gpu.timing import Check, median_seconds

ROWS, VOCAB, WIDTH, K = 300, 5000, 256, 8
# largest deviation from float64, as a share of the largest value
MOST = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def head_checks(device: torch.device, check: Check) -> dict[str, object]:
    """Every objective in fp32 and with bf16 operands, by the kernel and in plain torch, against fp64 autograd."""
    hidden, weight, targets, columns = _random_case()
    here = {name: values.to(device) for name, values in columns.items()}
    found: dict[str, object] = {}
    for softcap in (None, 20.0):
        for objective in (CrossEntropy(), Sampled(10.0), TopkReverseKl(K), TopkForwardKl(K)):
            exact = _results(Head(weight.clone(), None, softcap), hidden, targets, columns, objective)
            for label, operands, kernel in _ways(device):
                head = Head(weight.float().to(device), None, softcap, operands, kernel)
                ours = _results(head, hidden.float().to(device), targets.to(device), here, objective)
                for part, a, b in zip(("log-probs", "grad hidden", "grad weight"), ours, exact, strict=True):
                    capped = "" if softcap is None else ", soft cap"
                    name = f"head {type(objective).__name__} {label}{capped}, {part}"
                    found[name] = check(name, _deviation(a, b), MOST[operands or torch.float32])
    return found | _score_checks(device, check)


def _score_checks(device: torch.device, check: Check) -> dict[str, object]:
    """Log-probs and top k without gradients, against a float64 log-softmax."""
    hidden, weight, targets, _ = _random_case()
    exact = torch.log_softmax(hidden @ weight.T, dim=-1)
    found: dict[str, object] = {}
    for label, operands, kernel in _ways(device):
        head = Head(weight.float().to(device), operands=operands, kernel=kernel)
        scores = row_scores(head, hidden.float().to(device), targets.to(device), topk=K, tile_bytes=_some_rows())
        picked = {
            "target": (scores.logprobs, exact.gather(1, targets[:, None])[:, 0]),
            "top k": (scores.topk_logprobs, exact.topk(K, dim=-1).values),
        }
        for part, (ours, reference) in picked.items():
            name = f"scores {label}, {part}"
            # the inputs are exact in bf16 and products are summed in fp32, so scores are as accurate as in fp32
            found[name] = check(name, _deviation(ours, reference), MOST[torch.float32])
    return found


def _ways(device: torch.device) -> list[tuple[str, torch.dtype | None, bool]]:
    """Label, dtype of the operands, and whether the kernel handles the tiles."""
    ways: list[tuple[str, torch.dtype | None, bool]] = [("fp32 torch", None, False)]
    if device.type == "cuda":
        ways += [
            ("fp32 kernel", None, True),
            ("bf16 torch", torch.bfloat16, False),
            ("bf16 kernel", torch.bfloat16, True),
        ]
    return ways


def _random_case() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states and a weight whose values are exact in bf16, as float64; targets; the teacher's columns."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16().double()
    weight = (0.1 * torch.randn(VOCAB, WIDTH, generator=generator)).bfloat16().double()
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    teacher = torch.log_softmax(hidden @ weight.T + torch.randn(ROWS, VOCAB, generator=generator), dim=-1)
    top = teacher.topk(K, dim=-1)
    columns = {
        "teacher_logprobs": teacher.gather(1, targets[:, None])[:, 0],
        "topk_ids": top.indices,
        "topk_logprobs": top.values,
    }
    return hidden, weight, targets, columns


def _results(
    head: Head, hidden: Tensor, targets: Tensor, columns: dict[str, Tensor], objective: RowObjective
) -> list[Tensor]:
    """Log-probs and both gradients; the weight's gradient is summed in a main gradient, as in training."""
    leaf = hidden.clone().requires_grad_()
    main_grad = torch.zeros_like(head.weight)
    head.weight.requires_grad_()
    weights = torch.ones(len(leaf), dtype=torch.float64, device=leaf.device)
    losses = one_pass_losses(
        head, leaf, LossRows(targets, weights, columns), objective, main_grad=main_grad, tile_bytes=_some_rows()
    )
    return [losses.logprobs, torch.autograd.grad(losses.total, leaf)[0], main_grad]


def _some_rows() -> int:
    return 64 * VOCAB * 4


def _deviation(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double().cpu() - exact).abs().max() / exact.abs().max()).item()


def head_speeds(device: torch.device, width: int, vocab: int, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of the head's alternatives, medians of interleaved rounds on one full tile.

    The tile: the kernel, plain torch, or plain torch compiled. The weight's gradient: one `addmm`, or a product and an
    addition. The whole head: with the kernel or without.
    """
    rows = max(1, TILE_BYTES[device.type] // (4 * vocab))
    cuda = device.type == "cuda"
    operands = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(rows, width, device=device)
    weight = 0.02 * torch.randn(vocab, width, device=device)
    targets = torch.randint(vocab, (rows,), device=device)
    ids = targets[:, None]
    logits = torch.empty(rows, vocab, device=device)
    main_grad = torch.zeros_like(weight)
    values, scaled = torch.rand(rows, vocab, device=device).to(operands), hidden.to(operands)
    heads = {name: Head(weight, operands=operands, kernel=kernel) for name, kernel in _kernels(cuda).items()}

    def over_the_tile(head: Head) -> Callable[[], object]:
        return lambda: exponentials(head, logits, ids, targets).values.to(operands)

    def whole(head: Head) -> Callable[[], object]:
        weights = torch.ones(rows, dtype=torch.float64, device=device)
        columns = {"teacher_logprobs": torch.full((rows,), -11.0, device=device)}
        head.weight.requires_grad_()
        leaf = hidden.clone().requires_grad_()
        return lambda: one_pass_losses(
            head, leaf, LossRows(targets, weights, columns), Sampled(10.0), main_grad=main_grad
        )

    plain = heads["torch"]
    runs: dict[str, Callable[[], object]] = {f"tile, {name}": over_the_tile(head) for name, head in heads.items()}
    if cuda:
        compiled = torch.compile(lambda tile: exponentials(plain, tile, ids, targets).values.to(operands))
        runs["tile, compiled"] = lambda: compiled(logits)
    runs["weight gradient, addmm"] = lambda: plain.add_product(main_grad, values.T, scaled)
    runs["weight gradient, mm and add"] = lambda: main_grad.add_(plain.product(values.T, scaled))
    runs |= {f"head, {name}": whole(head) for name, head in heads.items()}
    found = _milliseconds(runs, device, rounds)
    print("head, ms a tile", json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
    return found


def head_peers(device: torch.device, width: int, vocab: int, rows: int, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds and peak bytes of cross entropy with both gradients: ours, plain torch, Liger where installed.

    Hidden states and weights are bf16. Ours and `liger_float32_sum` sum the weight's gradient in float32, `liger` and
    plain torch in bf16.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)
    weights = torch.ones(rows, dtype=torch.float64, device=device)

    def ours() -> None:
        main_grad = torch.zeros(vocab, width, device=device)
        losses = one_pass_losses(
            Head(weight, operands=dtype), hidden, LossRows(targets, weights, {}), CrossEntropy(), main_grad=main_grad
        )
        losses.total.backward()

    def plain() -> None:
        cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()

    runs: dict[str, Callable[[], object]] = {"ours": ours, "plain": plain}
    if device.type == "cuda" and find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for name, sums in (("liger", None), ("liger_float32_sum", torch.float32)):
            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=sums)
            runs[name] = lambda loss=loss: loss(weight, hidden, targets).backward()

    def alone(run: Callable[[], object]) -> Callable[[], object]:
        def fresh() -> None:
            run()
            hidden.grad = weight.grad = None

        return fresh

    times = _milliseconds({name: alone(run) for name, run in runs.items()}, device, rounds)
    found = {name: {"ms": times[name], "peak_bytes": _peak_growth(alone(run), device)} for name, run in runs.items()}
    print("cross entropy over the head", json.dumps(found), flush=True)
    return found


def _peak_growth(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return float(torch.cuda.max_memory_allocated(device) - before)


def _kernels(cuda: bool) -> dict[str, bool]:
    return {"torch": False} | ({"kernel": True} if cuda else {})


def _milliseconds(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    return {name: 1000 * seconds for name, seconds in median_seconds(runs, device, rounds).items()}
