"""One training step (forward and backward), ours and other people's, on one model: what `engine.py` compares.

Every variant computes the same loss, −A_t · log π_θ with A_t from stored teacher log-probs, averaged over tokens (TRL's
adds its prefix weights). Peers that take a token budget get ours. `two_pass` and `three_pass_recompute` are our own
versions of slime's and the paper's pipelines; `trl_*` call TRL's own functions on what its trainer would give them.
With adapters (`ADAPTED`), peers' are peft's: `peft_padded` is peft with plain transformers, `trl_peft` TRL with peft.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear_cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from opd_mcp.engine.data.batches import Batch, StepData, build_batch, packed_groups
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.losses.objectives import Sampled
from opd_mcp.engine.models.attention import Documents, hidden_rows, packed_hidden
from opd_mcp.engine.models.lora import add_adapter
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients
from opd_mcp.schemas.recipes import AdapterRecipe
from tools.bench.cases import RUNTIME, Case, build_model

CLIP = 10.0
Step = Callable[[PreTrainedModel, Sequences, Case], None]


def ours(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """The engine's own step."""
    accumulate_gradients(
        model, StepData(data, np.arange(len(data))), Sampled(CLIP), StepSettings("token", case.budget, RUNTIME)
    )


def _policy_loss(logprobs: Tensor, teacher: Tensor, tokens: int) -> Tensor:
    return -((teacher - logprobs).clamp(-CLIP, CLIP).detach() * logprobs).sum() / tokens


def _packs(data: Sequences, case: Case) -> list[Batch]:
    groups = packed_groups(data.lengths(), np.arange(len(data)), case.budget)
    return [build_batch(data, group, RUNTIME.device) for group in groups]


def naive_packed(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Our packs; the logits of every packed position as a model's forward gives them, log_softmax and autograd."""
    for batch in _packs(data, case):
        hidden = packed_hidden(model, batch.input_ids, Documents(batch.lengths, RUNTIME.device))
        logprobs = torch.log_softmax(model.lm_head(hidden).float(), dim=-1)
        chosen = logprobs[batch.rows, batch.targets]
        _policy_loss(chosen, batch.columns["teacher_logprobs"], len(data.response_ids)).backward()


def naive_packed_rows(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Our packs and response rows, with full logits and autograd: shows what the one-pass head alone gains."""
    for batch in _packs(data, case):
        logits = model.lm_head(hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)).float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, batch.targets[:, None])[:, 0]
        _policy_loss(logprobs, batch.columns["teacher_logprobs"], len(data.response_ids)).backward()


def torch_linear_cross_entropy(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Our packs and response rows; torch's fused function, unreduced, since A_t needs the log-probs."""
    for batch in _packs(data, case):
        hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
        losses = linear_cross_entropy(hidden, model.lm_head.weight, batch.targets, reduction="none")
        _policy_loss(-losses, batch.columns["teacher_logprobs"], len(data.response_ids)).backward()


def trl_chunked_logprob(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Our packs and response rows; TRL's chunked log-prob function with its own chunk size."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    for batch in _packs(data, case):
        hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
        logprobs, *_ = ChunkedLogProbFunction.apply(
            hidden, model.lm_head.weight, None, batch.targets, 1.0, 8192, None, 1.0, ()
        )
        _policy_loss(logprobs, batch.columns["teacher_logprobs"], len(data.response_ids)).backward()


def random_groups(data: Sequences, budget: int) -> list[list[int]]:
    """Rows in their random order, in groups whose padded size stays within the budget."""
    lengths, groups = data.lengths(), [[]]
    for row in range(len(data)):
        grown = [*groups[-1], row]
        if groups[-1] and len(grown) * max(lengths[r] for r in grown) > budget:
            grown = [row]
            groups.append([])
        groups[-1] = grown
    return groups


def naive_padded(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Plain HF: right-padded rows in random order, logits of every position, labels masked."""
    for group in random_groups(data, case.budget):
        width = max(int(data.lengths()[row]) for row in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
        teacher, counted = torch.zeros(len(group), width - 1), torch.zeros(len(group), width - 1)
        for slot, row in enumerate(group):
            tokens = np.concatenate([data.prompt(row), data.response(row)])
            ids[slot, : len(tokens)], mask[slot, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64)), 1
            first = len(data.prompt(row)) - 1
            teacher[slot, first : len(tokens) - 1] = torch.from_numpy(data.column("teacher_logprobs", row).copy())
            counted[slot, first : len(tokens) - 1] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
        losses = -(teacher - logprobs).clamp(-CLIP, CLIP).detach() * logprobs * counted
        (losses.sum() / len(data.response_ids)).backward()


def trl_iwopd_stored_teacher(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """TRL's IW-OPD step as its compute_loss runs it, the teacher server's answer replaced by stored log-probs."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_epsilon=1e-6,
        iw_opd_gamma=1.0,
        model=model,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    for group in random_groups(data, case.budget):
        before = max(len(data.prompt(row)) for row in group)
        after = max(len(data.response(row)) for row in group)
        ids = torch.zeros(len(group), before + after, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        teacher = torch.zeros(len(group), after)
        for slot, row in enumerate(group):
            prompt, response = data.prompt(row).astype(np.int64), data.response(row).astype(np.int64)
            ids[slot, before - len(prompt) : before] = torch.from_numpy(prompt)
            ids[slot, before : before + len(response)] = torch.from_numpy(response)
            mask[slot, before - len(prompt) : before + len(response)] = 1
            labels[slot, before : before + len(response)] = ids[slot, before : before + len(response)]
            teacher[slot, : len(response)] = torch.from_numpy(data.column("teacher_logprobs", row).copy())
        logits = model(input_ids=ids, attention_mask=mask).logits[:, before - 1 : -1, :]
        torch.log_softmax(logits / trainer.temperature, dim=-1)  # compute_loss does this before it picks the objective
        IWOPDTrainer._compute_iw_opd_loss(
            trainer,
            student_logits=logits,
            completion_tokens=ids[:, before:],
            labels=labels[:, before:],
            teacher_actual_logprobs=teacher,
            num_items_in_batch=len(data.response_ids),
        ).backward()


def _all_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of every packed token, prompts included, scaled by the temperature: Megatron's output layer in slime."""
    hidden = packed_hidden(model, batch.input_ids, Documents(batch.lengths, RUNTIME.device))
    return model.lm_head(hidden).float().div(1.0)


def _logprobs(logits: Tensor, batch: Batch) -> Tensor:
    return torch.log_softmax(logits[batch.rows], dim=-1).gather(1, batch.targets[:, None])[:, 0]


def two_pass(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """slime's: our packs; a pass without gradients for the old log-probs, then the training pass with its ratio."""
    batches = _packs(data, case)
    with torch.no_grad():
        old = [_logprobs(_all_logits(model, batch), batch) for batch in batches]
    for batch, before in zip(batches, old, strict=True):
        advantage = (batch.columns["teacher_logprobs"] - before).clamp(-CLIP, CLIP)
        ratio = (_logprobs(_all_logits(model, batch), batch) - before).exp()
        (-(ratio * advantage).sum() / len(data.response_ids)).backward()


def three_pass_recompute(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """The paper's: as `two_pass`, with entropy as a metric and full activation recomputation in the backward."""
    batches = _packs(data, case)
    with torch.no_grad():
        old = [_logprobs(_all_logits(model, batch), batch) for batch in batches]
    for batch, before in zip(batches, old, strict=True):
        advantage = (batch.columns["teacher_logprobs"] - before).clamp(-CLIP, CLIP)
        logits = checkpoint(_all_logits, model, batch, use_reentrant=False)
        with torch.no_grad():
            probabilities = torch.softmax(logits[batch.rows], dim=-1)
            (logits[batch.rows].logsumexp(dim=-1) - (probabilities * logits[batch.rows]).sum(dim=-1)).mean()
        ratio = (_logprobs(logits, batch) - before).exp()
        (-(ratio * advantage).sum() / len(data.response_ids)).backward()


TRAINING: dict[str, Step] = {
    "ours": ours,
    "naive_packed": naive_packed,
    "naive_packed_rows": naive_packed_rows,
    "naive_padded": naive_padded,
    "torch_linear_cross_entropy": torch_linear_cross_entropy,
    "trl_iwopd_stored_teacher": trl_iwopd_stored_teacher,
    "trl_chunked_logprob": trl_chunked_logprob,
    "two_pass": two_pass,
    "three_pass_recompute": three_pass_recompute,
}


def adapted_models(plain: PreTrainedModel, variants: list[str], case: Case) -> dict[str, nn.Module]:
    """A model per variant with an adapter of rank 32 on all linear layers: ours, else peft's on the same weights."""
    ours = build_model(case)
    add_adapter(ours, AdapterRecipe(), seed=0)
    if variants == ["ours"]:
        return {"ours": ours}
    from peft import LoraConfig, get_peft_model

    recipe = AdapterRecipe()
    config = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(plain, config).train()
    return {name: ours if name == "ours" else theirs for name in variants}


def peft_packed(model: nn.Module, data: Sequences, case: Case) -> None:
    """peft's adapters in our packs, with full logits and autograd."""
    naive_packed(model.get_base_model(), data, case)


ADAPTED: dict[str, Step] = {
    "ours": ours,
    "peft_padded": naive_padded,
    "peft_packed": peft_packed,
    "trl_peft": trl_iwopd_stored_teacher,
}


def body_ours(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Packed bodies with attention by document."""
    for batch in _packs(data, case):
        packed_hidden(model, batch.input_ids, Documents(batch.lengths, RUNTIME.device)).sum().backward()


def body_dense_mask(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """The same packs through transformers' own detection of packed position ids: SDPA with a [T, T] mask."""
    for batch in _packs(data, case):
        positions = Documents(batch.lengths, RUNTIME.device).positions
        decoder = model.get_decoder()
        decoder(
            input_ids=batch.input_ids[None], position_ids=positions, use_cache=False
        ).last_hidden_state.sum().backward()


def body_random_padding(model: PreTrainedModel, data: Sequences, case: Case) -> None:
    """Right-padded rows in random order with a padding mask."""
    for group in random_groups(data, case.budget):
        width = max(int(data.lengths()[row]) for row in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
        for slot, row in enumerate(group):
            tokens = np.concatenate([data.prompt(row), data.response(row)])
            ids[slot, : len(tokens)], mask[slot, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64)), 1
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        (hidden * mask[:, :, None]).sum().backward()


BODY: dict[str, Step] = {
    "ours": body_ours,
    "random_padding": body_random_padding,
    "dense_mask": body_dense_mask,
}
