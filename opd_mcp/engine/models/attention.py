"""Causal attention of documents packed into one row: each document sees itself only, and no [T, T] mask is made.

The function is registered with transformers' `AttentionInterface`; a model that uses it runs unpacked calls (padding
masks, KV caches) through SDPA as before. On the CPU documents of like length share one SDPA call; on CUDA bf16 and fp16
documents go through torch's variable-length attention, but long ones have SDPA calls of their own.
"""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opd_mcp.engine.models.embeddings import embedded

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch without it: SDPA per document there too
    varlen_attn = None  # type: ignore[assignment]

PACKED = "opd_packed"
# cuDNN, SDPA's choice on Hopper, plans each new width for 0.1 s
WIDTH_STEP = 128
# On CUDA a document of this length fills a GPU, and SDPA has faster kernels for it than the variable-length attention.
LONG_DOCUMENT = 1024
# score entries of padding that cost as much as one more SDPA call (forward and backward) of a small model
SPARE_SCORES = 16384


@dataclass(eq=False)
class Documents:
    """Lengths of the documents that lie end to end in one packed row of T tokens, on `device`.

    Not frozen: torch's compiler looks into frozen dataclasses, and would compile again for each number of documents.
    """

    lengths: list[int]
    device: torch.device
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def cumulative(self) -> Tensor:
        """Offsets int32 [N + 1]."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0).to(torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Position ids [1, T], counted from 0 in each document."""
        parts = [torch.arange(length) for length in self.lengths]
        return torch.cat(parts)[None].to(self.device) if parts else torch.zeros(1, 0, dtype=torch.long)

    @cached_property
    def runs(self) -> list[tuple[int, int, "Documents"]]:
        """The row in parts [start, stop): each long document alone, and the short ones between two of them together."""
        found: list[tuple[int, int, Documents]] = []
        start = 0
        for long, lengths in groupby(self.lengths, key=lambda length: length >= LONG_DOCUMENT):
            together = list(lengths)
            for part in [[length] for length in together] if long else [together]:
                found.append((start, start + sum(part), Documents(part, self.device)))
                start += sum(part)
        return found

    @cached_property
    def groups(self) -> list["DocumentGroup"]:
        """The documents as few padded attention calls."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        groups = []
        for first, last in attention_groups(self.lengths, SPARE_SCORES):
            lengths = self.lengths[first:last]
            width = max(lengths)
            indices = torch.arange(width)[None] + torch.tensor(starts[first:last])[:, None]
            inside = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
            even = bool(inside.all())
            groups.append(
                DocumentGroup(
                    starts[first],
                    starts[last],
                    last - first,
                    width,
                    None if even else indices.clamp_max(starts[last] - 1).flatten().to(self.device),
                    None if even else inside.flatten().nonzero()[:, 0].to(self.device),
                )
            )
        return groups

    def window_mask(self, width: int, window: int) -> Tensor:
        """True where a query may look: [L, L], the last `window` positions up to itself."""
        if (width, window) not in self._masks:
            distance = torch.arange(width, device=self.device)[:, None] - torch.arange(width, device=self.device)[None]
            self._masks[width, window] = (distance >= 0) & (distance < window)
        return self._masks[width, window]


def attention_groups(lengths: list[int], spare: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive documents that one padded attention call computes together.

    A document joins its predecessors while the padding costs at most `spare` score entries or an eighth of the work:
    below that a call of its own would cost more than the padding.
    """
    groups: list[tuple[int, int]] = []
    first, widest, work = 0, 0, 0
    for number, length in enumerate(lengths):
        grown, total = max(widest, length), work + length * length
        wasted = grown * grown * (number + 1 - first) - total
        if number > first and wasted > max(spare, total // 8):
            groups.append((first, number))
            first, grown, total = number, length, length * length
        widest, work = grown, total
    return [*groups, (first, len(lengths))] if lengths else groups


@dataclass(frozen=True)
class DocumentGroup:
    """N consecutive documents, tokens start … stop − 1, padded to one width; `indices`, `inside` if lengths differ."""

    start: int
    stop: int
    documents: int
    width: int
    indices: Tensor | None
    inside: Tensor | None

    def padded(self, states: Tensor) -> Tensor:
        """States [h, T, d] of the packed row as [N, h, L, d]."""
        chosen = states[:, self.start : self.stop] if self.indices is None else states.index_select(1, self.indices)
        return chosen.unflatten(1, (self.documents, self.width)).transpose(0, 1)

    def unpadded(self, states: Tensor) -> Tensor:
        """The inverse: [N, h, L, d] as [tokens, h, d]."""
        flat = states.transpose(1, 2).flatten(0, 1)
        return flat if self.inside is None else flat.index_select(0, self.inside)


@torch.compiler.disable
def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention output [1, T, h, d] of query [1, h, T, d] and key, value [1, h_kv, T, d] within each document.

    `options` are transformers': `dropout`, `scaling`, `sliding_window`, …, and our `documents`; SDPA without those.
    Raises NotImplementedError for what changes scores in ways that neither call knows (soft caps, attention sinks).
    """
    documents: Documents | None = options.pop("documents", None)
    scaling, dropout = options.get("scaling"), options.get("dropout")
    if documents is None:
        if query.shape[2] == 1 and attention_mask is not None and query.shape[1] != key.shape[1] and not dropout:
            return _one_token(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"packed attention with {unknown or 'dropout'}")
    scale, window = query.shape[-1] ** -0.5 if scaling is None else scaling, options.get("sliding_window")
    if torch.is_autocast_enabled(query.device.type):
        # norms with fp32 weights have widened queries and keys, not values
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None:
        return _on_cuda(query[0], key[0], value[0], documents, scale, window)[None], None
    return _by_document(query[0], key[0], value[0], documents, scale, window)[None], None


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention [B, 1, h, d] of one new token; query heads that share a key head are its queries: nothing is copied."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, 1, heads, width)


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    shared = query.shape[0] != key.shape[0]
    parts = []
    for group in documents.groups:
        masked = window is not None and group.width > window
        out = scaled_dot_product_attention(
            group.padded(query),
            group.padded(key),
            group.padded(value),
            attn_mask=documents.window_mask(group.width, window) if masked and window is not None else None,
            is_causal=not masked,
            scale=scale,
            enable_gqa=shared,
        )
        parts.append(group.unpadded(out))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    if window is not None:
        return _variable_length(query, key, value, documents, scale, window)
    parts = []
    for start, stop, part in documents.runs:
        states = (query[:, start:stop], key[:, start:stop], value[:, start:stop])
        alone = len(part.lengths) == 1 and stop - start >= LONG_DOCUMENT
        parts.append(_one_document(*states, scale) if alone else _variable_length(*states, part, scale, None))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one_document(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention [T, h, d] of one document; no token looks at the padding behind it."""
    length = query.shape[1]
    padding = (0, 0, 0, -length % WIDTH_STEP)
    if padding[-1]:
        query, key, value = (pad(states, padding) for states in (query, key, value))
    output = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0, :, :length].transpose(0, 1)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError("this torch's varlen_attn knows no sliding window")
    if "scale" in known:
        options["scale"] = scale
    elif abs(scale - query.shape[-1] ** -0.5) > 1e-9:
        query = query * (scale * query.shape[-1] ** 0.5)
    heads, shared = query.shape[0], key.shape[0]
    if heads != shared and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif heads != shared:
        key, value = (states.repeat_interleave(heads // shared, dim=0) for states in (key, value))
    longest = max(documents.lengths)
    output = varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        documents.cumulative,
        documents.cumulative,
        longest,
        longest,
        **options,
    )
    return output if isinstance(output, Tensor) else output[0]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packs(model: PreTrainedModel) -> bool:
    """Whether the model runs packed rows."""
    return bool(model.config.get_text_config()._attn_implementation == PACKED)


def padding_warning(model: PreTrainedModel) -> str | None:
    """What to tell of a model whose rows have to be padded; None for one that packs them."""
    if packs(model):
        return None
    return (
        f"{type(model).__name__} does not compute packed rows as it computes them alone, or drops attention weights in "
        "training, so its rows are padded in length buckets: slower, with the same numbers."
    )


def hidden_rows(
    model: PreTrainedModel, input_ids: Tensor, lengths: list[int], rows: Tensor, *, main_grad: Tensor | None = None
) -> Tensor:
    """Last hidden states [R, H] at the positions `rows` [R] of documents that lie end to end in `input_ids` [T].

    A model that does not pack gets them as right-padded rows: causal attention keeps the padding out of every earlier
    position, so no mask is needed. `main_grad` collects the gradient of a packing model's embeddings where it can.
    """
    documents = Documents(lengths, input_ids.device)
    if packs(model):
        return packed_hidden(model, input_ids, documents, main_grad=main_grad).index_select(0, rows)
    return padded_hidden(model, input_ids, documents).index_select(0, rows)


def packed_hidden(
    model: PreTrainedModel, input_ids: Tensor, documents: Documents, *, main_grad: Tensor | None = None
) -> Tensor:
    """Last hidden states [T, H] of packed `input_ids` [T]; the model uses the attention named PACKED."""
    # a mask that is already four-dimensional is passed through, so no dense one is made
    unused = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    embeddings = embedded(model, input_ids, main_grad)
    output = model.get_decoder()(
        input_ids=input_ids[None] if embeddings is None else None,
        inputs_embeds=None if embeddings is None else embeddings[None],
        position_ids=documents.positions,
        attention_mask=unused,
        use_cache=False,
        documents=documents,
    )
    return output.last_hidden_state[0]


def padded_hidden(model: PreTrainedModel, input_ids: Tensor, documents: Documents) -> Tensor:
    """Last hidden states [T, H] of the same ids, computed as one padded row per document."""
    lengths = torch.tensor(documents.lengths, device=input_ids.device)
    inside = torch.arange(int(lengths.max()), device=input_ids.device)[None] < lengths[:, None]
    padded = torch.zeros(inside.shape, dtype=torch.long, device=input_ids.device).masked_scatter(inside, input_ids)
    return model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state[inside]


def use_packed_attention(model: PreTrainedModel, computed_in: torch.dtype | None = None) -> bool:
    """Switch the model to packed attention if two packed documents then equal the same two alone; say whether.

    How equal depends on what is `computed_in`, by default the dtype of the model's weights.

    A class with a state between tokens, score caps, sinks or attention of its own fails the comparison, or raises, and
    keeps SDPA: it has to be padded. So does a model in training mode whose attention drops weights.
    """
    before = model.config._attn_implementation
    vocab = model.config.get_text_config().vocab_size
    lengths = [7, 5]
    ids = (torch.arange(sum(lengths), device=model.device) * 7 + 1) % vocab
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            decoder = model.get_decoder()
            alone = [decoder(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids.split(lengths)]
            model.set_attn_implementation(PACKED)
            together = packed_hidden(model, ids, Documents(lengths, model.device))
            if was_training:
                packed_hidden(model.train(), ids, Documents(lengths, model.device))  # raises for dropout in attention
        most = _tolerance(computed_in or model.dtype) * together.abs().max()
        equal = bool(((together - torch.cat(alone)).abs().max() <= most).item())
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        equal = False
    finally:
        model.train(was_training)
    if not equal:
        model.set_attn_implementation(before)
    return equal


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.1
