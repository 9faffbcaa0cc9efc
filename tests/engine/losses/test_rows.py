"""The objectives against plain autograd and against full enumeration, in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.losses.rows import cross_entropy_rows, sampled_rows, topk_reverse_kl_rows

R, V, K = 7, 11, 3


def random_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(V, (R,), generator=generator)
    teacher = torch.log_softmax(torch.randn(R, V, dtype=torch.float64, generator=generator), dim=-1)
    return logits, targets, teacher


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), logits)[0]


def test_sampled_gradient_is_the_stop_gradient_policy_gradient() -> None:
    logits, targets, teacher = random_rows()
    teacher_logprobs = teacher.gather(1, targets[:, None])[:, 0]
    ours = gradient(sampled_rows(logits, targets, teacher_logprobs, advantage_clip=0.5).loss, logits)

    logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    advantage = (teacher_logprobs - logprobs).clamp(-0.5, 0.5).detach()
    plain = gradient(-advantage * logprobs, logits)
    assert advantage.abs().max() == 0.5, "some advantages are clipped in this example"
    assert (ours - plain).abs().max() <= 1e-12


def test_sampled_gradient_in_closed_form() -> None:
    """dL/dlogits = −A (onehot − softmax): nothing flows through the advantage."""
    logits, targets, teacher = random_rows(1)
    teacher_logprobs = teacher.gather(1, targets[:, None])[:, 0]
    losses = sampled_rows(logits, targets, teacher_logprobs, advantage_clip=10.0)
    advantage = teacher_logprobs - losses.logprobs
    onehot = torch.nn.functional.one_hot(targets, V).double()
    expected = -advantage[:, None] * (onehot - logits.softmax(-1)).detach()
    assert (gradient(losses.loss, logits) - expected).abs().max() <= 1e-12


def test_topk_reverse_kl_gradient_equals_autograd_of_the_bucketed_divergence() -> None:
    logits, targets, teacher = random_rows(2)
    top = teacher.topk(K, dim=-1)
    ours = topk_reverse_kl_rows(logits, targets, top.indices, top.values).loss

    student = torch.log_softmax(logits, dim=-1).exp()
    inside = student.gather(1, top.indices)
    outside = 1 - inside.sum(-1)
    bucketed_student = torch.cat([inside, outside[:, None]], dim=1)
    bucketed_teacher = torch.cat([top.values.exp(), 1 - top.values.exp().sum(-1, keepdim=True)], dim=1)
    plain = (bucketed_student * (bucketed_student / bucketed_teacher).log()).sum(-1)
    assert (ours - plain).abs().max() <= 1e-12
    assert (gradient(ours, logits) - gradient(plain, logits)).abs().max() <= 1e-12


@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.1, 20.0))
def test_topk_reverse_kl_with_its_tail_bucket_is_never_negative(seed: int, sharpness: float) -> None:
    logits, targets, teacher = random_rows(seed)
    top = torch.log_softmax(sharpness * teacher, dim=-1).topk(K, dim=-1)
    # a tail below the least mass counts as that mass, which can undercut zero by as much
    assert (topk_reverse_kl_rows(sharpness * logits, targets, top.indices, top.values).loss >= -2e-6).all()


def test_topk_reverse_kl_is_zero_when_the_student_is_the_teacher() -> None:
    _, targets, teacher = random_rows(3)
    top = teacher.topk(K, dim=-1)
    losses = topk_reverse_kl_rows(teacher.clone().requires_grad_(), targets, top.indices, top.values)
    assert losses.loss.abs().max() <= 1e-12


def test_cross_entropy_equals_torch() -> None:
    logits, targets, _ = random_rows(4)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    ours = cross_entropy_rows(logits, targets)
    assert (ours.loss - plain).abs().max() <= 1e-12
    assert (gradient(ours.loss, logits) - gradient(plain, logits)).abs().max() <= 1e-12


def test_topk_without_a_tail_is_refused() -> None:
    logits, targets, teacher = random_rows(5)
    top = teacher.topk(V, dim=-1)
    with pytest.raises(AssertionError, match="tail"):
        topk_reverse_kl_rows(logits, targets, top.indices, top.values)


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
    losses = sampled_rows((features @ weight)[rows], targets, teacher_logprobs, advantage_clip=1e9)
    probability = losses.logprobs.reshape(-1, length).sum(dim=1).exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    policy_gradient = gradient(losses.loss * probability.repeat_interleave(length), weight)

    student = torch.log_softmax(features @ weight, dim=-1)
    divergence = (student.exp() * (student - teacher)).sum(-1)
    reached = torch.tensor(
        [
            sum(student[prefixes.index(prefix[:place]), token].item() for place, token in enumerate(prefix))
            for prefix in prefixes
        ],
        dtype=torch.float64,
    ).exp()
    exact = gradient(divergence * reached, weight)
    assert exact.abs().max() > 0.1, "the example has a gradient to compare"
    assert (policy_gradient - exact).abs().max() <= 1e-10
