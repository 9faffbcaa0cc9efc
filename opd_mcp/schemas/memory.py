"""How many bytes a training step holds: one arithmetic for the plan and for the engine's choices.

The bytes of a layer's activations are what autograd was measured to keep for packed Qwen3 layers; other classes
differ by a few values per token. `tests/engine/training/test_activations.py` measures them again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, Self

from opd_mcp.schemas.recipes import ActivationCheckpointing, Precision, Replicas, VocabularySharing

CheckpointingPolicy = Literal["none", "selective", "full"]
POLICIES: tuple[CheckpointingPolicy, ...] = ("none", "selective", "full")
# Logits alive at the same time: one tile, whatever the micro-batch size.
TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
# Tokens of prompts that go through a model together: they fill any device, and their activations do not.
PREFILL_TOKENS = 1 << 14
# Bytes per 4-bit weight, with a float32 scale for 64 values; values that are widened to float32 at a time.
NF4_BYTES = 0.5 + 4 / 64
NF4_CHUNK = 1 << 24
# 8-bit optimizer state: values that share a scale.
BLOCK = 256
# Share of memory left free for the allocator's gaps and for what the formulas do not cover.
USABLE_SHARE = 0.9
# Bytes per token that a layer keeps, by width (residual stream, queries, keys, feed-forward). Under autocast the norms
# and the residual stream stay float32; with bf16 weights the norms do. Compiled layers keep what matrix products and
# attention read, and compute the rest again.
LAYER_BYTES = {
    "float32": (24, 17, 17, 16),
    "autocast": (28, 11, 11, 9),
    "compiled_autocast": (14, 6, 8, 6),
    "bf16": (16, 11, 11, 8),
}
# The same under an adapter: a norm whose weight is frozen need not keep what it normalised.
FROZEN_LAYER_BYTES = {
    "float32": (16, 13, 13, 16),
    "autocast": (20, 9, 9, 9),
    "compiled_autocast": (14, 6, 8, 6),
    "bf16": (12, 9, 9, 8),
}
# What of a model's (text) config its shape follows from.
SHAPE_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size"),
    *("sliding_window", "windowed_layers"),
)
# Tokens that a generation's buffers hold next to a window: those of a recorded segment, and its alignment.
WINDOW_ROOM = 256 + 64
# Tokens that buffers hold behind the longest row where rows join others: those of a short segment, no more than are
# drawn, and as many for its alignment; and the share of the rows whose prompts are taken in at a time.
JOINING_ROOM, JOINING_SHARE = 64, 1 / 8
# Values that selective checkpointing keeps: the layer's input, and the outputs of its products and of attention.
SELECTIVE_VALUES = (3, 2, 2, 2)


@dataclass(frozen=True)
class ModelShape:
    """The few numbers of a model that its memory depends on; widths in values, a tied output layer counted once.

    Of the layers `windowed` keep the last `window` tokens only.
    """

    parameters: int
    layers: int
    hidden: int
    query_width: int
    kv_width: int
    intermediate: int
    vocab: int
    experts: bool = False
    window: int = 0
    windowed: int = 0

    @classmethod
    def of(cls, parameters: int, vocab: int, setting: Callable[[str], int | None]) -> Self:
        """The shape by the (text) config's settings; missing settings count as small."""
        hidden = setting("hidden_size") or 1
        heads = setting("num_attention_heads") or 1
        width = setting("head_dim") or hidden // heads
        at_a_time = setting("num_experts_per_tok") or 0
        experts = at_a_time * (setting("moe_intermediate_size") or 0)
        return cls(
            parameters=parameters,
            layers=setting("num_hidden_layers") or 1,
            hidden=hidden,
            query_width=heads * width,
            kv_width=(setting("num_key_value_heads") or heads) * width,
            intermediate=max(setting("intermediate_size") or 0, experts),
            vocab=vocab,
            experts=at_a_time > 0,
            window=setting("sliding_window") or 0,
            windowed=setting("windowed_layers") or 0,
        )

    def cached_values(self, prompt: float, length: float) -> float:
        """Keys and values that a row of `length` tokens holds when it is generated after a prompt of that many."""
        windowed = min(self.windowed, self.layers)
        in_window = min(length, max(self.window + WINDOW_ROOM, prompt))
        return 2 * self.kv_width * ((self.layers - windowed) * length + windowed * in_window)

    def adapter_parameters(self, rank: int, targets: Sequence[str] | None = None) -> int:
        """Values of an adapter on these linear layers, by the names and widths of most decoders; None: on all."""
        ends = {
            "q_proj": self.hidden + self.query_width,
            "k_proj": self.hidden + self.kv_width,
            "v_proj": self.hidden + self.kv_width,
            "o_proj": self.query_width + self.hidden,
            "gate_proj": self.hidden + self.intermediate,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        largest = max(ends.values())
        return rank * self.layers * sum(ends.get(name, largest) for name in (ends if targets is None else targets))

    def linear_values(self) -> int:
        """Values of the linear layers, which can be held in 4 bits; of a mixture of experts, of attention alone."""
        attention = 2 * (self.query_width + self.kv_width)
        values = self.layers * self.hidden * (attention + (0 if self.experts else 3 * self.intermediate))
        return min(values, self.parameters)

    def weights(self, value_bytes: int, packed: int = 0) -> int:
        """Bytes of the weights, of which `packed` are held in 4 bits, with what dequantising one layer takes."""
        held = value_bytes * (self.parameters - packed) + ceil(NF4_BYTES * packed)
        if not packed:
            return held
        largest = self.hidden * max(self.query_width, 0 if self.experts else self.intermediate)
        return held + value_bytes * largest + 12 * min(largest, NF4_CHUNK)

    def widths(self) -> tuple[int, int, int, int]:
        """Residual stream, queries, keys, feed-forward."""
        return self.hidden, self.query_width, self.kv_width, self.intermediate


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step by what holds them, and the activation checkpointing that they belong to.

    Of one of several ranks, `divided` says whether it computes with its own rows of the vocabulary alone.
    """

    policy: CheckpointingPolicy
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    divided: bool = False

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class AdapterSize:
    """An adapter on frozen weights: its values, bytes per frozen weight, and values of an earlier, frozen adapter.

    `ranks` is the width of all low-rank products of a layer together; `packed` of the frozen weights are in 4 bits.
    """

    trained: int
    ranks: int
    base_bytes: int
    earlier: int = 0
    packed: int = 0


@dataclass(frozen=True)
class StepSize:
    """What decides the memory of a training step besides its model: `tokens` are those of the largest micro-batch.

    Of several `ranks` that train the model, it is the memory of one; they hold so many `replicas` of it.
    `compiled` layers keep less; a plan cannot know whether layers will be compiled and assumes plain ones.
    """

    precision: Precision
    tokens: int
    dtype: Literal["float32", "bfloat16"]
    device: str
    compiled: bool = False
    adapter: "AdapterSize | None" = None
    ranks: int = 1
    vocabulary: VocabularySharing = "auto"
    replicas: int = 1

    @property
    def sharing(self) -> int:
        """How many ranks hold one replica together."""
        return max(1, self.ranks // self.replicas)

    @property
    def arithmetic(self) -> str:
        """The dtype of the layers' computation: float32, bf16 copies of float32 weights (autocast), or bf16 weights."""
        if self.adapter is not None and self.dtype == "bfloat16":
            return "bf16" if self.adapter.base_bytes == 2 else "autocast"
        if not keeps_float32(self.precision):
            return "bf16"
        return "autocast" if self.dtype == "bfloat16" else "float32"


def training_memory(
    shape: ModelShape, step: StepSize, checkpointing: ActivationCheckpointing, room: int
) -> TrainingMemory:
    """The memory of a step; `auto` takes the first checkpointing policy that fits `room`, in bytes.

    Several ranks gather the vocabulary for a step where that fits with any of the policies.
    """
    policies = POLICIES if checkpointing == "auto" else (checkpointing,)
    alone = [_memory_with(policy, shape, step) for policy in policies]
    if step.ranks == 1:
        found = alone
    else:
        ways = {"auto": (False, True), "gathered": (False,), "divided": (True,)}[step.vocabulary]
        found = [_share_of_a_rank(memory, shape, step, divided) for divided in ways for memory in alone]
    return next((memory for memory in found if memory.total <= USABLE_SHARE * room), found[-1])


@dataclass(frozen=True)
class Division:
    """How ranks on `nodes`, equally many on each, share a student; `room` are the bytes that one rank has."""

    wish: Replicas
    nodes: int
    room: int

    def replicas(self, shape: ModelShape, step: StepSize, checkpointing: ActivationCheckpointing) -> int:
        """The replicas that the ranks hold: as wished, else one per node where that fits each rank, else one."""
        if self.wish != "auto":
            return self.wish
        if self.nodes == 1:
            return 1
        within = replace(step, replicas=self.nodes)
        fits = training_memory(shape, within, checkpointing, self.room).total <= USABLE_SHARE * self.room
        return self.nodes if fits else 1


def micro_tokens(micro_batch_tokens: int, longest: int, total: int) -> int:
    """Tokens of a step's largest micro-batch: the setting, or a longer row; no more than the step has."""
    return min(max(micro_batch_tokens, longest), total)


def keeps_float32(precision: Precision) -> bool:
    """Whether the model's own weights are float32 during training."""
    return precision in ("fp32_master", "fp32_master_8bit")


def weight_bytes(precision: Precision) -> int:
    """Bytes of a stored weight."""
    return 4 if keeps_float32(precision) else 2


def optimizer_bytes(precision: Precision, shape: ModelShape) -> int:
    """Bytes of optimizer state: two float32 moments, or two of bf16 and the low part of a split master.

    8-bit moments have a float32 scale for each block; those of the embedding stay float32. (So do those of small
    weights, such as norms, which are not counted as such.)
    """
    if precision == "fp32_master_8bit":
        embedding = min(shape.vocab * shape.hidden, shape.parameters)
        return 8 * embedding + ceil(2 * (1 + 4 / BLOCK) * (shape.parameters - embedding))
    return {"fp32_master": 8, "split_master": 6, "bf16_stochastic": 4, "bf16": 4}[precision] * shape.parameters


def saved_bytes(precision: Precision) -> int:
    """Bytes per parameter of the trained model on the disk: its master weights."""
    return 4 if keeps_float32(precision) or precision == "split_master" else 2


def _memory_with(policy: CheckpointingPolicy, shape: ModelShape, step: StepSize) -> TrainingMemory:
    arithmetic, precision, tokens = step.arithmetic, step.precision, step.tokens
    narrow = arithmetic != "float32"
    # autocast keeps a bf16 copy of float32 weights until the backward is done
    copies = 2 if arithmetic == "autocast" else 0
    tile = min(4 * tokens * shape.vocab, TILE_BYTES.get(step.device, TILE_BYTES["cpu"]))
    head_copy = 4 * shape.vocab * shape.hidden if narrow else 0
    if (adapter := step.adapter) is not None:
        return _adapter_memory(policy, shape, step, adapter)
    return TrainingMemory(
        policy=policy,
        weights=(weight_bytes(precision) + copies) * shape.parameters,
        gradients=4 * shape.parameters,
        optimizer=optimizer_bytes(precision, shape),
        activations=tokens * _token_bytes(policy, shape, step),
        head=tile + (tile // 2 if narrow else 0) + head_copy + 12 * tokens * shape.hidden,
    )


def _adapter_memory(
    policy: CheckpointingPolicy, shape: ModelShape, step: StepSize, adapter: AdapterSize
) -> TrainingMemory:
    """As for all weights, but that gradients and moments are the adapter's, and the head forms no weight gradient.

    The inputs of the frozen products are kept for the adapter instead; the low-rank values come on top.
    """
    narrow, tokens = step.arithmetic != "float32", step.tokens
    tile = min(4 * tokens * shape.vocab, TILE_BYTES.get(step.device, TILE_BYTES["cpu"]))
    # a bf16 head is its own operand on CUDA; elsewhere it is widened
    same = adapter.base_bytes == 2 and step.device == "cuda"
    widened = 4 * shape.vocab * shape.hidden if narrow and not same else 0
    # autocast makes a bf16 copy of a float32 weight, kept for the input's gradient
    copies = 2 if step.arithmetic == "autocast" and policy != "full" else 0
    low_rank = (2 if narrow else 4) * adapter.ranks
    layers = 1 if policy == "full" else shape.layers  # a selective checkpoint keeps the outputs of all products
    return TrainingMemory(
        policy=policy,
        weights=shape.weights(adapter.base_bytes, adapter.packed)
        + copies * (shape.parameters - adapter.packed)
        + 4 * (adapter.trained + adapter.earlier),
        gradients=4 * adapter.trained,
        optimizer=8 * adapter.trained,
        activations=tokens * (_token_bytes(policy, shape, step) + layers * low_rank),
        head=tile + (tile // 2 if narrow else 0) + widened + 12 * tokens * shape.hidden,
    )


def _share_of_a_rank(memory: TrainingMemory, shape: ModelShape, step: StepSize, divided: bool) -> TrainingMemory:
    """One rank's part of a replica, with what it gathers: the vocabulary, and two layers with a gradient.

    Of the vocabulary there are at most two matrices, which an untied model has; norms and adapters, which every rank
    has whole, are small. Layers are gathered in the dtype that they compute in, so autocast copies none. A vocabulary
    that is `divided` in the step as well is not gathered, but for the embedding's rows of a micro-batch's tokens and
    their gradient; the other ranks' tokens come tile by tile.
    """
    adapter, ranks, narrow = step.adapter, step.sharing, step.arithmetic != "float32"
    held = weight_bytes(step.precision) if adapter is None else adapter.base_bytes
    vocabulary = min(2 * shape.vocab * shape.hidden, shape.parameters)
    layer = (shape.parameters - vocabulary) // shape.layers
    weights = held * shape.parameters // ranks + 2 * layer * (2 if narrow else 4)
    gathered = min(step.tokens, shape.vocab) * shape.hidden if divided else vocabulary
    head = memory.head
    if divided:
        whole = 4 * shape.vocab * shape.hidden if narrow else 0
        tile = min(TILE_BYTES.get(step.device, TILE_BYTES["cpu"]) * ranks // (4 * shape.vocab), ranks * step.tokens)
        head = max(head - whole, 0) + whole // ranks + 16 * tile * shape.hidden
    if adapter is not None:
        thin = 4 * (adapter.trained + adapter.earlier)
        return replace(memory, weights=weights + held * gathered + thin, head=head, divided=divided)
    return replace(
        memory,
        weights=weights + held * gathered,
        gradients=4 * (shape.parameters // ranks + layer + gathered),
        optimizer=memory.optimizer // ranks,
        head=head,
        divided=divided,
    )


def _token_bytes(policy: CheckpointingPolicy, shape: ModelShape, step: StepSize) -> int:
    arithmetic = step.arithmetic
    # recomputed layers may run uncompiled
    kind = "compiled_autocast" if step.compiled and arithmetic == "autocast" and policy == "none" else arithmetic
    bytes_of = LAYER_BYTES if step.adapter is None else FROZEN_LAYER_BYTES
    whole = sum(width * each for width, each in zip(shape.widths(), bytes_of[kind], strict=True))
    if policy == "none":
        return (shape.layers + 1) * whole
    value = 4 if arithmetic == "float32" else 2
    kept = (2 if arithmetic == "bf16" else 4) * shape.hidden
    if policy == "selective":
        kept += value * sum(width * each for width, each in zip(shape.widths(), SELECTIVE_VALUES, strict=True))
    # one layer at a time is recomputed and differentiated
    return shape.layers * kept + 2 * whole
