"""Decoding on CUDA: one step is recorded as a graph and replayed, so that the GPU does not wait for Python.

A step is some thousand short kernels, which Python launches more slowly than the GPU runs them. A graph has fixed
shapes, so keys and values lie in buffers with room for the next SEGMENT tokens. At a segment's end rows that have ended
are dropped, room is made, and the step is recorded again. Layers with a window begin each segment with the tokens that
the window still holds.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from opd_mcp.engine.generation.batch_state import BatchState
from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.kv_cache import FixedCache, FixedLayer, RoomyLayer, continued, takes_masks_by_kind

logger = logging.getLogger(__name__)

SEGMENT = 256
# attention kernels want the mask's rows aligned
ALIGNMENT = 64
# steps between two checks whether all rows have ended; a check waits for the GPU
LOOK_EVERY = 16
# below this a recording costs more than it saves
LEAST_STEPS = 8
# transformers' names for layers without and with a window
FULL, SLIDING = "full_attention", "sliding_attention"


def replays(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether the steps after this cache's prefill can be recorded: on CUDA, and `has_fixed_steps`."""
    return model.device.type == "cuda" and has_fixed_steps(model, cache)


def has_fixed_steps(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether the model decodes in buffers of fixed size: our attention, and layers that see everything or a window.

    A class whose layers differ in that has to take a mask for each kind of layer.
    """
    config = model.config.get_text_config()
    if not packs(model) or len(cache.layers) != config.num_hidden_layers:
        return False
    kinds = {type(layer) for layer in cache.layers}
    if kinds == {RoomyLayer}:
        return True
    if not kinds <= {RoomyLayer, DynamicSlidingWindowLayer}:
        return False
    windows = {layer.sliding_window for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer}
    named = set(getattr(config, "layer_types", None) or ())
    # layers with chunks have caches of the same class, but other masks
    if (
        windows != {getattr(config, "sliding_window", None)}
        or not named <= {FULL, SLIDING}
        or getattr(config, "attention_chunk_size", None)
    ):
        return False
    return len(kinds) == 1 or (len(named) == 2 and takes_masks_by_kind(type(model.get_decoder()).forward))


@dataclass
class Columns:
    """The columns of a segment's buffers in all layers with the same `window`; None where they see everything.

    `mask` [n, 1, 1, E] is added to the scores. The segment's first token is written to column `begin`, the next one to
    column `cursor` [1]. Once a window is full (`slides`), each step hides the token that leaves it.
    """

    mask: Tensor
    cursor: Tensor
    begin: int
    window: int | None = None
    slides: bool = False

    def show(self) -> None:
        """Let the next token see itself, and no more than its window."""
        self.mask.index_fill_(3, self.cursor, 0.0)
        if self.slides and self.window is not None:
            self.mask.index_fill_(3, self.cursor - self.window, -torch.inf)

    def next(self, kept: Tensor, done: int, steps: int) -> "Columns":
        """Those of a segment of `steps` tokens with the rows `kept` [m], after `done` tokens of this one."""
        end = self.begin + done
        seen = self.seen(end)
        slides = self.window is not None and seen + steps > self.window
        # so that the column to hide is never before the first one
        begin = self.window if slides and self.window is not None else seen
        extent = -(-(begin + steps) // ALIGNMENT) * ALIGNMENT
        mask = self.mask.new_full((len(kept), 1, 1, extent), -torch.inf)
        mask[..., begin - seen : begin] = self.mask[kept, :, :, end - seen : end]
        return Columns(mask, torch.full_like(self.cursor, begin), begin, self.window, slides)

    def seen(self, end: int) -> int:
        """How many of the columns before `end` the next token sees."""
        return end if self.window is None else min(end, self.window - 1)

    def moved(self, states: Tensor, kept: Tensor, end: int, after: "Columns") -> Tensor:
        """Buffers for the columns `after` these, with the rows `kept` of `states` [n, h, E, d] up to column `end`."""
        seen, extent = self.seen(end), after.mask.shape[3]
        # zeros, since a masked token still has a share of 0 in a sum
        room = states.new_zeros(len(kept), states.shape[1], extent, states.shape[3])
        room[:, :, after.begin - seen : after.begin] = states[kept, :, end - seen : end]
        return room


@dataclass
class Segment:
    """The buffers of steps with the same shapes: n rows, room for the keys and values of the tokens to come.

    `input_ids` and `positions` [n, 1] are those of the next token; `columns` by the layers' window, `windows` [layers].
    """

    model: PreTrainedModel
    state: BatchState
    input_ids: Tensor
    positions: Tensor
    cache: DynamicCache
    columns: dict[int | None, Columns]
    windows: list[int | None]

    def step(self) -> None:
        """Draw the next token of each row."""
        for columns in self.columns.values():
            columns.show()
        hidden = continued(self.model, self.cache, self.input_ids, self.masks(), self.positions)
        drawn = self.state.take(head_logits(self.model, hidden[:, -1]))
        self.input_ids.copy_(drawn[:, None])
        self.positions += 1
        for columns in self.columns.values():
            columns.cursor += 1

    def masks(self) -> Tensor | dict[str, Tensor]:
        """The mask of all layers, or of each kind of layer by transformers' name for it."""
        if len(self.columns) == 1:
            return next(iter(self.columns.values())).mask
        return {FULL if window is None else SLIDING: columns.mask for window, columns in self.columns.items()}

    def next(self, kept: Tensor, done: int, steps: int) -> "Segment":
        """The rows `kept` [m] after `done` tokens of this segment, and room for `steps` more."""
        after = {window: columns.next(kept, done, steps) for window, columns in self.columns.items()}
        cache = FixedCache()
        for layer, window in zip(self.cache.layers, self.windows, strict=True):
            before = self.columns[window]
            end = before.begin + done
            keys, values = (before.moved(states, kept, end, after[window]) for states in (layer.keys, layer.values))
            cache.layers.append(FixedLayer(keys, values, after[window].cursor))
            # the caller still has the old cache: so one layer is held twice at a time, not all
            layer.keys = layer.values = keys.new_empty(0)
        self.state.keep(kept)
        return Segment(self.model, self.state, self.input_ids[kept], self.positions[kept], cache, after, self.windows)


def _prefilled_segment(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, positions: Tensor, drawn: Tensor, state: BatchState
) -> Segment:
    """What the prefill left, as a segment without room: prompt mask [B, L], last positions [B, 1], first tokens [B]."""
    added = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(mask == 0, -torch.inf)[:, None, None]
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    columns = {}
    for layer, window in zip(cache.layers, windows, strict=True):
        held = layer.keys.shape[2]
        columns[window] = Columns(added[..., mask.shape[1] - held :], mask.new_full((1,), held), held, window)
    return Segment(model, state, drawn[:, None], positions + 1, cache, columns, windows)


def draw_replayed(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, positions: Tensor, drawn: Tensor, state: BatchState
) -> None:
    """Draw the rest of a batch after its prefill: prompt mask [B, L], last positions [B, 1], first tokens [B]."""
    steps, done = 0, 1
    segment = _prefilled_segment(model, cache, mask, positions, drawn, state)
    recording = Recording(state.generator)
    while done < state.limit:
        kept = state.going().nonzero()[:, 0]
        if len(kept) == 0:
            return
        if len(kept) == 1 < len(state.rows):
            # compilers make code of their own for one row
            kept = torch.cat([kept, (kept + 1) % len(state.rows)])
        taken, steps = steps, min(SEGMENT, state.limit - done)
        segment = segment.next(kept, taken, steps)
        step, recorded = segment.step, steps >= LEAST_STEPS
        for number in range(steps):
            if number and number % LOOK_EVERY == 0 and not state.going().any():
                return
            # the first step does what must not happen during a recording: compile and look for the fastest kernels
            if number == 1 and recorded:
                recording.try_step(segment.step)
                step = recording.of(segment.step)
            else:
                step()
        done += steps


class Recording:
    """The graph of a batch's step, and one memory for all the graphs that it needs one after the other."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool: Any = None
        self.possible: bool | None = None

    def try_step(self, step: Callable[[], None]) -> None:
        """Take one step; the first time find out whether it waits for the GPU, which cannot be recorded.

        A recording that fails leaves torch's generators and allocator in an undefined state, so it is not even tried.
        What a step does before it waits is done again: it writes the same values to the same addresses.
        """
        if self.possible is None:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
                self.possible = True
                return
            except RuntimeError as error:
                self.possible = False
                logger.warning("Decoding step by step, more slowly: a step waits for the GPU (%s).", error)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        step()

    def of(self, step: Callable[[], None]) -> Callable[[], None]:
        """What replays the step; the step itself where it cannot be recorded."""
        if not self.possible:
            return step
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        self.graph = graph  # only now: the graph before keeps their common memory alive
        return graph.replay
