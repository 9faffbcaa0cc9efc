"""The objectives in closed form and against full enumeration, in float64; test_linear_head.py has every gradient."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.losses.linear_head import HeadLosses, LossRows, one_pass_losses
from opd_mcp.engine.losses.logit_tiles import Head
from opd_mcp.engine.losses.objectives import (
    CrossEntropy,
    RowObjective,
    Sampled,
    TopkEntropyMixed,
    TopkForwardKl,
    TopkJensenShannon,
    TopkReverseKl,
)

R, V, K = 7, 11, 3
DIVERGENCES = [TopkReverseKl(K), TopkForwardKl(K), TopkJensenShannon(K, 0.3), TopkEntropyMixed(K)]


def random_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(V, (R,), generator=generator)
    teacher = torch.log_softmax(torch.randn(R, V, dtype=torch.float64, generator=generator), dim=-1)
    return logits, targets, teacher


def losses_of(
    objective: RowObjective, logits: torch.Tensor, targets: torch.Tensor, **columns: torch.Tensor
) -> HeadLosses:
    """The objective on given logits: a head whose weight is the identity."""
    identity = Head(torch.eye(logits.shape[1], dtype=logits.dtype))
    weights = torch.ones(len(logits), dtype=torch.float64)
    return one_pass_losses(identity, logits, LossRows(targets, weights, columns), objective)


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), logits)[0]


def test_sampled_gradient_is_the_stop_gradient_policy_gradient() -> None:
    logits, targets, teacher = random_rows()
    teacher_logprobs = teacher.gather(1, targets[:, None])[:, 0]
    ours = gradient(losses_of(Sampled(0.5), logits, targets, teacher_logprobs=teacher_logprobs).total, logits)

    logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    advantage = (teacher_logprobs - logprobs).clamp(-0.5, 0.5).detach()
    plain = gradient(-advantage * logprobs, logits)
    assert advantage.abs().max() == 0.5, "some advantages are clipped in this example"
    assert (ours - plain).abs().max() <= 1e-12


def test_sampled_gradient_in_closed_form() -> None:
    """dL/dlogits = −A (onehot − softmax): nothing flows through the advantage."""
    logits, targets, teacher = random_rows(1)
    teacher_logprobs = teacher.gather(1, targets[:, None])[:, 0]
    losses = losses_of(Sampled(10.0), logits, targets, teacher_logprobs=teacher_logprobs)
    advantage = teacher_logprobs - losses.logprobs
    onehot = torch.nn.functional.one_hot(targets, V).double()
    expected = -advantage[:, None] * (onehot - logits.softmax(-1)).detach()
    assert (gradient(losses.total, logits) - expected).abs().max() <= 1e-12


def test_topk_reverse_kl_gradient_equals_autograd_of_the_bucketed_divergence() -> None:
    logits, targets, teacher = random_rows(2)
    top = teacher.topk(K, dim=-1)
    ours = losses_of(TopkReverseKl(K), logits, targets, topk_ids=top.indices, topk_logprobs=top.values)

    student = torch.log_softmax(logits, dim=-1).exp()
    inside = student.gather(1, top.indices)
    outside = 1 - inside.sum(-1)
    bucketed_student = torch.cat([inside, outside[:, None]], dim=1)
    bucketed_teacher = torch.cat([top.values.exp(), 1 - top.values.exp().sum(-1, keepdim=True)], dim=1)
    plain = (bucketed_student * (bucketed_student / bucketed_teacher).log()).sum(-1)
    assert (ours.losses - plain).abs().max() <= 1e-12
    assert (gradient(ours.total, logits) - gradient(plain, logits)).abs().max() <= 1e-12


def test_clipped_topk_gradient_is_the_expectation_of_the_sampled_one() -> None:
    """Over every token of the vocabulary, drawn from π_θ, when the teacher's tail is spread as the student's is."""
    logits, _, teacher = random_rows(7)
    top = teacher.topk(K, dim=-1)
    ours = losses_of(
        TopkReverseKl(K, advantage_clip=0.5),
        logits,
        torch.zeros(R, dtype=torch.long),
        topk_ids=top.indices,
        topk_logprobs=top.values,
    )
    student = torch.log_softmax(logits, dim=-1).detach()
    student_tail = student.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    teacher_tail = (1 - top.values.exp().sum(-1, keepdim=True)).log()
    bucketed = (student + teacher_tail - student_tail).scatter(1, top.indices, top.values)
    expected = torch.zeros_like(student)
    for token in range(V):
        targets = torch.full((R,), token)
        sampled = losses_of(Sampled(0.5), logits, targets, teacher_logprobs=bucketed[:, token])
        expected += student[:, [token]].exp() * gradient(sampled.total, logits)
    assert (bucketed - student).abs().max() > 0.5, "some log-ratios are clipped in this example"
    assert (gradient(ours.total, logits) - expected).abs().max() <= 1e-12


@given(
    seed=st.integers(0, 10_000),
    sharpness=st.floats(0.1, 20.0),
    objective=st.sampled_from(DIVERGENCES),
)
def test_a_divergence_with_its_tail_bucket_is_never_negative(
    seed: int, sharpness: float, objective: RowObjective
) -> None:
    logits, targets, teacher = random_rows(seed)
    top = torch.log_softmax(sharpness * teacher, dim=-1).topk(K, dim=-1)
    # a tail below the least mass counts as that mass, which can undercut zero by as much
    losses = losses_of(objective, sharpness * logits, targets, topk_ids=top.indices, topk_logprobs=top.values)
    assert (losses.losses >= -2e-6).all()


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, TopkForwardKl(K)), (1 - 1e-7, TopkReverseKl(K))])
def test_jensen_shannon_goes_from_the_forward_to_the_reverse_divergence(beta: float, limit: RowObjective) -> None:
    logits, targets, teacher = random_rows(8)
    top = teacher.topk(K, dim=-1)
    columns = {"topk_ids": top.indices, "topk_logprobs": top.values}
    scaled = losses_of(TopkJensenShannon(K, beta), logits, targets, **columns).losses / min(beta, 1 - beta)
    assert scaled.detach() == pytest.approx(losses_of(limit, logits, targets, **columns).losses.detach(), rel=1e-5)


def test_a_sure_teacher_is_met_by_the_reverse_and_an_unsure_one_by_the_forward_divergence() -> None:
    logits, targets, _ = random_rows(9)
    for masses, like in (([1 - 3e-9, 1e-9, 1e-9], TopkReverseKl(K)), ([0.25, 0.25, 0.25], TopkForwardKl(K))):
        columns = {
            "topk_ids": torch.arange(K).repeat(R, 1),
            "topk_logprobs": torch.tensor([masses] * R, dtype=torch.float64).log(),
        }
        mixed = losses_of(TopkEntropyMixed(K), logits, targets, **columns).losses.detach()
        assert mixed == pytest.approx(losses_of(like, logits, targets, **columns).losses.detach(), rel=1e-4)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_a_divergence_is_zero_when_the_student_is_the_teacher(objective: RowObjective) -> None:
    _, targets, teacher = random_rows(3)
    top = teacher.topk(K, dim=-1)
    student = teacher.clone().requires_grad_()
    losses = losses_of(objective, student, targets, topk_ids=top.indices, topk_logprobs=top.values)
    assert losses.losses.abs().max() <= 1e-12
    assert gradient(losses.total, student).abs().max() <= 1e-12


def test_cross_entropy_equals_torch() -> None:
    logits, targets, _ = random_rows(4)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    ours = losses_of(CrossEntropy(), logits, targets)
    assert (ours.losses - plain).abs().max() <= 1e-12
    assert (gradient(ours.total, logits) - gradient(plain, logits)).abs().max() <= 1e-12


def test_topk_without_a_tail_is_refused() -> None:
    logits, targets, teacher = random_rows(5)
    top = teacher.topk(V, dim=-1)
    with pytest.raises(AssertionError, match="tail"):
        losses_of(TopkReverseKl(V), logits, targets, topk_ids=top.indices, topk_logprobs=top.values)


def test_expected_policy_gradient_is_the_gradient_of_the_reverse_kl() -> None:
    """By enumeration of every response: E_x Σ_t −A_t ∇log π_θ = ∇ Σ_t KL(π_θ‖π_T) at prefixes drawn from π_θ.

    The prefix distribution is not differentiated, the clip is off, T = 1: the identity behind Lightning OPD. The
    policy is linear in random features of the prefix, float64 throughout (transformers' norms round to float32).
    """
    vocab, length, width = 4, 3, 5
    generator = torch.Generator().manual_seed(6)
    responses = list(itertools.product(range(vocab), repeat=length))
    prefixes = sorted({response[:position] for response in responses for position in range(length)})
    features = torch.randn(len(prefixes), width, dtype=torch.float64, generator=generator)
    weight = torch.randn(width, vocab, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(len(prefixes), vocab, dtype=torch.float64, generator=generator), dim=-1)

    rows = torch.tensor([prefixes.index(response[:position]) for response in responses for position in range(length)])
    targets = torch.tensor(responses).flatten()
    teacher_logprobs = teacher[rows].gather(1, targets[:, None])[:, 0]
    student = torch.log_softmax(features @ weight, dim=-1)
    probability = student[rows].gather(1, targets[:, None]).reshape(-1, length).sum(dim=1).exp().detach()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    losses = one_pass_losses(
        Head(weight.T),
        features[rows],
        LossRows(targets, probability.repeat_interleave(length), {"teacher_logprobs": teacher_logprobs}),
        Sampled(1e9),
    )
    policy_gradient = gradient(losses.total, weight)

    divergence = (student.exp() * (student - teacher)).sum(-1)
    reached = torch.tensor(
        [
            sum(student[prefixes.index(prefix[:position]), token].item() for position, token in enumerate(prefix))
            for prefix in prefixes
        ],
        dtype=torch.float64,
    ).exp()
    exact = gradient(divergence * reached, weight)
    assert exact.abs().max() > 0.1, "the example has a gradient to compare"
    assert (policy_gradient - exact).abs().max() <= 1e-10
