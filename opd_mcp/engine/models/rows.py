"""Logits of chosen rows only: prompts and padding cost no head FLOPs."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def hidden_rows(model: PreTrainedModel, input_ids: Tensor, rows: Tensor) -> Tensor:
    """Last hidden states at the flat positions `rows` [R] of right-padded `input_ids` [B, L]; returns [R, H].

    Causal attention keeps right padding out of every earlier position, so no mask is needed.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[rows]


def head_logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """fp32 (or fp64) logits [R, V] of hidden states [R, H].

    bf16-rounded logits would put errors of the size of a typical advantage into the log-probs, so the product is
    accumulated and returned in at least fp32 whatever the weights are.
    """
    head = model.get_output_embeddings()
    with torch.autocast(rows.device.type, enabled=False):
        if rows.device.type == "cuda" and head.weight.dtype is torch.bfloat16 and not torch.is_grad_enabled():
            logits = torch.mm(rows.to(torch.bfloat16), head.weight.T, out_dtype=torch.float32)
        else:
            wide = torch.promote_types(head.weight.dtype, torch.float32)
            logits = torch.nn.functional.linear(rows.to(wide), head.weight.to(wide))
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
