"""The gradient of a step does not depend on how the step is cut or padded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import StepData, build_batch, grouped_rows
from opd_mcp.engine.data.sequences import Sequences, build_sequences
from opd_mcp.engine.losses import logit_tiles as tiles
from opd_mcp.engine.losses.linear_head import LossRows, one_pass_losses
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, distill_objective, token_weights
from opd_mcp.engine.models.attention import hidden_rows, packs, use_packed_attention
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.step import StepSettings, StepTokens, accumulate_gradients
from opd_mcp.schemas.recipes import DistillRecipe

VOCAB = 13


@pytest.fixture
def sequences() -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCAB, size=size).tolist() for size in (1, 4, 9, 3, 2)]
    responses = [rng.integers(2, VOCAB, size=size).tolist() for size in (6, 1, 12, 0, 3)]
    tokens = sum(map(len, responses))
    columns = {
        "teacher_logprobs": -rng.exponential(size=tokens).astype(np.float32),
        "behaviour_logprobs": -rng.exponential(size=tokens).astype(np.float32),
    }
    return build_sequences(prompts, responses, columns=columns)


def gradients_of(
    model: PreTrainedModel,
    sequences: Sequences,
    runtime: Runtime,
    *,
    micro_batch_tokens: int,
    normalize: str = "sample",
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    result = accumulate_gradients(
        model,
        StepData(sequences, np.arange(len(sequences))),
        distill_objective(DistillRecipe(advantage_clip=1.0)),
        StepSettings(normalize, micro_batch_tokens, runtime),
    )
    return result.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(params=["packed", "padded"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = tiny_model(VOCAB, seed=0)
    if request.param == "packed":
        assert use_packed_attention(model)
    return model


@pytest.mark.parametrize("normalize", ["sample", "token"])
def test_micro_batches_do_not_change_the_gradient(
    model: PreTrainedModel, sequences: Sequences, runtime: Runtime, normalize: str
) -> None:
    whole, one_batch = gradients_of(model, sequences, runtime, micro_batch_tokens=10_000, normalize=normalize)
    cut, many_batches = gradients_of(model, sequences, runtime, micro_batch_tokens=1, normalize=normalize)
    assert cut == pytest.approx(whole, rel=1e-6)
    for a, b in zip(one_batch, many_batches, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max().clamp_min(1e-12)


def test_tiles_give_the_gradient_of_the_whole(
    model: PreTrainedModel,
    sequences: Sequences,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, kept = gradients_of(model, sequences, runtime, micro_batch_tokens=10_000)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 8 * VOCAB * 3)
    tiled, cut = gradients_of(model, sequences, runtime, micro_batch_tokens=10_000)
    assert tiled == pytest.approx(whole, rel=1e-9)
    for a, b in zip(kept, cut, strict=True):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max().clamp_min(1e-12)


def test_gradient_equals_plain_autograd_row_by_row(
    model: PreTrainedModel, sequences: Sequences, runtime: Runtime
) -> None:
    """SFT on response tokens only, each row alone and unpadded through transformers' own forward."""
    model.zero_grad()
    accumulate_gradients(
        model, StepData(sequences, np.arange(len(sequences))), SFT_OBJECTIVE, StepSettings("token", 10_000, runtime)
    )
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    tokens = len(sequences.response_ids)
    for row in range(len(sequences)):
        prompt, response = sequences.prompt(row), sequences.response(row)
        if len(response) == 0:
            continue
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        (torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum") / tokens).backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        assert (a - p.grad).abs().max() <= 1e-6 * p.grad.abs().max().clamp_min(1e-12)


def test_step_reports_log_probs_with_their_columns_in_one_order(
    model: PreTrainedModel, sequences: Sequences, runtime: Runtime
) -> None:
    numbered = sequences.with_columns(teacher_logprobs=np.arange(len(sequences.response_ids), dtype=np.float32))
    objective = distill_objective(DistillRecipe())
    results = [
        accumulate_gradients(
            model,
            StepData(numbered, np.arange(len(sequences))),
            objective,
            StepSettings("sample", micro_batch_tokens, runtime),
        )
        for micro_batch_tokens in (1, 10_000)
    ]
    by_position = [dict(zip(r.columns["teacher_logprobs"].tolist(), r.logprobs.tolist(), strict=True)) for r in results]
    assert by_position[0].keys() == by_position[1].keys()
    assert all(by_position[0][k] == pytest.approx(by_position[1][k], abs=1e-6) for k in by_position[0])


def test_sequence_scoped_weights_take_a_first_pass_and_stay_constant(
    model: PreTrainedModel, sequences: Sequences, runtime: Runtime
) -> None:
    """Each sequence's tokens weighed by its own mean probability, held constant, against two plain steps."""
    tokens = len(sequences.response_ids)

    def mean_probability(step: StepTokens) -> torch.Tensor:
        count = torch.zeros(len(sequences), dtype=step.logprobs.dtype).index_add_(
            0, step.sequence, torch.ones_like(step.logprobs)
        )
        total = torch.zeros_like(count).index_add_(0, step.sequence, step.logprobs.exp())
        return (total / count.clamp_min(1))[step.sequence]

    for micro_batch_tokens in (1, 10_000):
        model.zero_grad()
        accumulate_gradients(
            model,
            StepData(sequences, np.arange(len(sequences))),
            SFT_OBJECTIVE,
            StepSettings("token", micro_batch_tokens, runtime),
            reweigh=mean_probability,
        )
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for row in range(len(sequences)):
            prompt, response = sequences.prompt(row), sequences.response(row)
            if len(response):
                ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
                losses = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
                ((-losses).exp().mean().detach() * losses.sum() / tokens).backward()
        for a, p in zip(ours, model.parameters(), strict=True):
            assert (a - p.grad).abs().max() <= 1e-6 * p.grad.abs().max().clamp_min(1e-12)


def test_tied_embeddings_get_both_gradients(
    tiny_model: Callable[..., PreTrainedModel], sequences: Sequences, runtime: Runtime
) -> None:
    """The embedding's share goes around autograd on a packing model, and through it on a padded one."""
    tied = tiny_model(VOCAB, seed=0, tie_word_embeddings=True)
    padded, gradients = gradients_of(tied, sequences, runtime, micro_batch_tokens=20)
    assert use_packed_attention(tied)
    packed, direct = gradients_of(tied, sequences, runtime, micro_batch_tokens=20)
    assert packed == pytest.approx(padded, rel=1e-6)
    for a, b in zip(gradients, direct, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max().clamp_min(1e-12)


def test_one_process_adds_up_its_micro_batches_one_by_one_to_the_bit(
    model: PreTrainedModel, sequences: Sequences, runtime: Runtime
) -> None:
    """The bits of a training without ranks are those of this loop, written out."""
    objective, budget = distill_objective(DistillRecipe(advantage_clip=1.0)), 16
    loss, gradients = gradients_of(model, sequences, runtime, micro_batch_tokens=budget)
    model.zero_grad()
    rows = np.arange(len(sequences))
    weights = token_weights(torch.from_numpy(sequences.response_lengths()), "sample")
    head = model_head(model, None)
    embedding, total = model.get_input_embeddings().weight, torch.zeros((), dtype=torch.float64)
    for weight in (head.weight, embedding):
        weight.grad = torch.zeros_like(weight)
    for group in grouped_rows(sequences.lengths(), rows, budget, packed=packs(model)):
        if sequences.response_lengths()[group].sum() == 0:
            continue
        batch = build_batch(sequences, group, runtime.device)
        hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows, main_grad=embedding.grad)
        own = LossRows(batch.targets, weights[torch.from_numpy(batch.indices)][batch.sequence], batch.columns)
        losses = one_pass_losses(head, hidden, own, objective, main_grad=head.weight.grad)
        losses.total.backward()
        total += losses.total.detach()
    assert float(total) == loss
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(expected) == len(gradients)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
