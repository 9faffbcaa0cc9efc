"""The one-pass head against plain autograd in float64: loss, log-probs and every gradient, whatever the tile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_mcp.engine.losses import logit_tiles as tiles
from opd_mcp.engine.losses.linear_head import LossRows, one_pass_losses, row_scores
from opd_mcp.engine.losses.logit_tiles import Head
from opd_mcp.engine.losses.objectives import (
    ConstantPenalty,
    CrossEntropy,
    RowObjective,
    Sampled,
    TopkEntropyMixed,
    TopkForwardKl,
    TopkJensenShannon,
    TopkReverseKl,
)

R, V, H, K, CLIP = 23, 61, 12, 4, 0.7
OBJECTIVES: dict[str, RowObjective] = {
    "cross_entropy": CrossEntropy(),
    "sampled": Sampled(CLIP),
    "topk_reverse_kl": TopkReverseKl(K),
    "topk_forward_kl": TopkForwardKl(K),
    "topk_js": TopkJensenShannon(K, 0.3),
    "topk_entropy_mixed": TopkEntropyMixed(K),
    "extrapolated": Sampled(CLIP, 1.5),
    "opsa": ConstantPenalty(),
}
ONE_ROW, SOME_ROWS, ALL_ROWS = V * 8, 5 * V * 8, 10**9


def random_case(seed: int = 0, rows: int = R) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """hidden [R, H], weight [V, H], targets [R], row weights [R] and the teacher's columns."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, H, dtype=torch.float64, generator=generator)
    targets = torch.randint(V, (rows,), generator=generator)
    teacher = torch.log_softmax(2 * torch.randn(rows, V, dtype=torch.float64, generator=generator), dim=-1)
    top = teacher.topk(K, dim=-1)
    columns = {
        "teacher_logprobs": teacher.gather(1, targets[:, None])[:, 0],
        "behaviour_logprobs": -torch.rand(rows, dtype=torch.float64, generator=generator),
        "topk_ids": top.indices,
        "topk_logprobs": top.values,
    }
    return hidden, weight, targets, torch.rand(rows, dtype=torch.float64, generator=generator), columns


def largest_difference(ours: Tensor, plain: Tensor) -> float:
    return ((ours - plain).abs().max() / plain.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("tile_bytes", [ONE_ROW, SOME_ROWS, ALL_ROWS])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_autograd(
    name: str, with_bias: bool, softcap: float | None, tile_bytes: int, plain_losses: Callable[..., Tensor]
) -> None:
    hidden, weight, targets, row_weights, columns = random_case()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64) if with_bias else None
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]

    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = plain_losses(name, logits, targets, columns, CLIP)
    plain = (losses * row_weights).sum()
    expected = torch.autograd.grad(plain, leaves)

    head = Head(weight, bias, softcap)
    ours = one_pass_losses(
        head, hidden, LossRows(targets, row_weights, columns), OBJECTIVES[name], tile_bytes=tile_bytes
    )
    assert abs(ours.total.item() - plain.item()) <= 1e-12 * abs(plain.item())
    assert largest_difference(ours.losses, losses.detach()) <= 1e-12
    assert largest_difference(ours.logprobs, torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]) <= 1e-12
    for gradient, reference in zip(torch.autograd.grad(ours.total, leaves), expected, strict=True):
        assert largest_difference(gradient, reference) <= 1e-12


@pytest.mark.parametrize("rows", [1, 7])
def test_logits_come_block_by_block_of_the_weight(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    hidden, weight, targets, row_weights, columns = random_case()
    found = []
    for cached in (rows * weight.shape[1] * weight.itemsize, 2**20):
        monkeypatch.setattr(tiles, "CACHED_WEIGHT_BYTES", cached)
        leaf = hidden.detach().requires_grad_()
        ours = one_pass_losses(Head(weight), leaf, LossRows(targets, row_weights, columns), OBJECTIVES["sampled"])
        found.append([ours.logprobs, torch.autograd.grad(ours.total, leaf)[0]])
    for blocks, whole in zip(*found, strict=True):
        assert largest_difference(blocks, whole) <= 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_weight_s_gradient_can_be_added_to_a_main_gradient(name: str) -> None:
    hidden, weight, targets, row_weights, columns = random_case(1)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    whole = one_pass_losses(Head(weight), hidden, LossRows(targets, row_weights, columns), OBJECTIVES[name])
    grad_hidden, grad_weight = torch.autograd.grad(whole.total, leaves)
    main_grad = torch.ones_like(weight)
    into = one_pass_losses(
        Head(weight), hidden, LossRows(targets, row_weights, columns), OBJECTIVES[name], main_grad=main_grad
    )
    into.total.backward()
    assert weight.grad is None
    assert largest_difference(hidden.grad, grad_hidden) <= 1e-14
    assert largest_difference(main_grad - 1, grad_weight) <= 1e-12


def test_tied_embeddings_collect_the_gradients_of_both_ends(plain_losses: Callable[..., Tensor]) -> None:
    _, weight, targets, row_weights, columns = random_case(2)
    tied, ids = weight.requires_grad_(), torch.arange(R) % V
    plain = (plain_losses("sampled", tied[ids].tanh() @ tied.T, targets, columns, CLIP) * row_weights).sum()
    expected = torch.autograd.grad(plain, tied)[0]
    tied.grad = torch.zeros_like(tied)
    one_pass_losses(
        Head(tied), tied[ids].tanh(), LossRows(targets, row_weights, columns), Sampled(CLIP), main_grad=tied.grad
    ).total.backward()
    assert largest_difference(tied.grad, expected) <= 1e-12


def test_an_empty_micro_batch_has_zero_loss_and_zero_gradients() -> None:
    hidden, weight, targets, row_weights, columns = random_case(3, rows=0)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    ours = one_pass_losses(Head(weight), hidden, LossRows(targets, row_weights, columns), TopkReverseKl(K))
    assert ours.total.item() == 0
    assert [g.abs().sum().item() for g in torch.autograd.grad(ours.total, leaves)] == [0, 0]


def test_a_masked_vocabulary_is_a_head_of_its_first_ids(plain_losses: Callable[..., Tensor]) -> None:
    """Ids from `valid` on are as if their logits were −inf: no mass, no gradient."""
    hidden, weight, targets, row_weights, columns = random_case(4)
    valid = 40
    targets, weight = targets % valid, weight.requires_grad_()
    masked = (hidden @ weight.T).masked_fill(torch.arange(V) >= valid, -torch.inf)
    expected = torch.autograd.grad(
        (plain_losses("sampled", masked, targets, columns, CLIP) * row_weights).sum(), weight
    )[0]
    ours = one_pass_losses(Head(weight[:valid]), hidden, LossRows(targets, row_weights, columns), Sampled(CLIP))
    gradient = torch.autograd.grad(ours.total, weight)[0]
    assert largest_difference(gradient, expected) <= 1e-12
    assert gradient[valid:].abs().max() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_certain_rows_stay_finite_in_float32(name: str) -> None:
    """Logits hundreds apart: all mass on one id, inside or outside the ids that the loss reads."""
    hidden, weight, targets, row_weights, columns = (
        t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in random_case(5)
    )
    columns = {n: v.float() if v.is_floating_point() else v for n, v in columns.items()}
    leaves = [(400 * hidden).requires_grad_(), weight.requires_grad_()]
    ours = one_pass_losses(Head(weight), leaves[0], LossRows(targets, row_weights, columns), OBJECTIVES[name])
    assert all(torch.isfinite(t).all() for t in (ours.losses, *torch.autograd.grad(ours.total, leaves)))


def test_float32_gradients_keep_the_argmax_s_rounding_small() -> None:
    """1 − π of a likely token is summed from the other ids, never subtracted: right to float32 however likely it is."""
    weight = torch.tensor([[1.0], [0.0], [0.0]])
    hidden = torch.tensor([[17.0]]).requires_grad_()
    ours = one_pass_losses(Head(weight), hidden, LossRows(torch.tensor([0]), torch.ones(1), {}), CrossEntropy())
    exact = -2 / (2 + torch.tensor(17.0, dtype=torch.float64).exp())
    assert torch.autograd.grad(ours.total, hidden)[0].item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("tile_bytes", [ONE_ROW, ALL_ROWS])
def test_scores_and_top_k_come_from_the_same_tile(tile_bytes: int) -> None:
    hidden, weight, targets, _, _ = random_case(6)
    scores = row_scores(Head(weight), hidden, targets, topk=K, valid_vocab=50, tile_bytes=tile_bytes)
    expected = torch.log_softmax(hidden @ weight.T, dim=-1)
    top = expected[:, :50].topk(K, dim=-1)
    assert largest_difference(scores.logprobs, expected.gather(1, targets[:, None])[:, 0]) <= 1e-12
    assert (scores.topk_ids == top.indices).all()
    assert largest_difference(scores.topk_logprobs, top.values) <= 1e-12
