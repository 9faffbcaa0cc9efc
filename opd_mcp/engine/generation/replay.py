"""Decoding on CUDA: one step is recorded as a graph and replayed, so that the GPU does not wait for Python.

A step is some thousand short kernels, which Python launches more slowly than the GPU runs them. A graph has fixed
shapes, so keys and values lie in buffers with room for the next SEGMENT tokens, and all rows write theirs into the same
column. A row that joins takes the place of one that has ended: its prompt lies at the left of that column, and nothing
is recorded anew. At a segment's end rows that have ended are dropped, room is made, and the step is recorded again.
Layers with a window begin each segment with the tokens that the window still holds.
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
from opd_mcp.engine.generation.prefill import Prefill, Waiting
from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.kv_cache import FixedCache, FixedLayer, RoomyLayer, continued, takes_masks_by_kind
from opd_mcp.schemas.memory import JOINING_SHARE

logger = logging.getLogger(__name__)

SEGMENT = 256
# attention kernels want the mask's rows aligned
ALIGNMENT = 64
# steps between two looks which rows have ended; a look waits for the GPU
LOOK_EVERY = 16
# Rows join a batch until its buffers hold more bytes. A row that joins reads the columns of the longest one, and a step
# reads all of them: up to here that takes about as long as the rest of a step, 3.8 ms at the 0.6B shape
# (docs/gpu-h200.json), at the bandwidth of an H200.
JOINING_BYTES = 16 << 30
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

    def next(self, kept: Tensor, end: int, room: "Room") -> "Columns":
        """Those of the next segment with the rows `kept` [m], which have written the columns before `end`."""
        seen, least = self.seen(room.longest), self.seen(room.waiting)
        slides = self.window is not None and max(seen, least) + room.steps > self.window
        # so that the column to hide is never before the first one
        begin = self.window if slides and self.window is not None else max(seen, least)
        extent = -(-(begin + room.steps) // ALIGNMENT) * ALIGNMENT
        mask = self.mask.new_full((len(kept), 1, 1, extent), -torch.inf)
        mask[..., begin - seen : begin] = self.mask[kept, :, :, end - seen : end]
        return Columns(mask, torch.full_like(self.cursor, begin), begin, self.window, slides)

    def seen(self, tokens: int) -> int:
        """How many of a row's `tokens` its next one sees."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def moved(self, states: Tensor, kept: Tensor, end: int, after: "Columns", seen: int) -> Tensor:
        """Buffers for the columns `after` these, with the `seen` columns before `end` of the rows `kept` of `states`.

        `states` are [n, h, E, d].
        """
        extent = after.mask.shape[3]
        # zeros, since a masked token still has a share of 0 in a sum
        room = states.new_zeros(len(kept), states.shape[1], extent, states.shape[3])
        room[:, :, after.begin - seen : after.begin] = states[kept, :, end - seen : end]
        return room

    def join(self, places: Tensor, end: int, mask: Tensor) -> None:
        """Let the rows at `places` [m] see the columns before `end` by this prompt's mask [m, held]."""
        self.mask.index_fill_(0, places, -torch.inf)
        self.mask[..., end - mask.shape[1] : end].index_copy_(0, places, added(mask, self.mask.dtype))


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask [n, L] adds to the scores: [n, 1, 1, L]."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask == 0, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class Room:
    """What a segment has room for: `steps` tokens, after `longest` tokens of a row in work, or a prompt that waits."""

    steps: int
    longest: int
    waiting: int


@dataclass
class Segment:
    """The buffers of steps with the same shapes: n rows, room for the keys and values of the tokens to come.

    `input_ids` and `positions` [n, 1] are those of the next token; `columns` by the layers' window, `windows` [layers].
    Rows join one that is `open`; once a segment is not, none after it is, and places of rows that end are given up.
    """

    model: PreTrainedModel
    state: BatchState
    input_ids: Tensor
    positions: Tensor
    cache: DynamicCache
    columns: dict[int | None, Columns]
    windows: list[int | None]
    open: bool = True

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

    def next(self, kept: Tensor, done: int, room: Room) -> "Segment":
        """The places `kept` [m] after `done` tokens of this segment, with room for more."""
        after = {window: columns.next(kept, columns.begin + done, room) for window, columns in self.columns.items()}
        cache = FixedCache()
        for layer, window in zip(self.cache.layers, self.windows, strict=True):
            before = self.columns[window]
            how = (kept, before.begin + done, after[window], before.seen(room.longest))
            keys, values = (before.moved(states, *how) for states in (layer.keys, layer.values))
            cache.layers.append(FixedLayer(keys, values, after[window].cursor))
            # the caller still has the old cache: so one layer is held twice at a time, not all
            layer.keys = layer.values = keys.new_empty(0)
        self.state.keep(kept)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Segment(
            self.model,
            self.state,
            self.input_ids[kept],
            self.positions[kept],
            cache,
            after,
            self.windows,
            self.open and held <= JOINING_BYTES,
        )

    def room(self, kept: Tensor, waiting: Waiting) -> Room:
        """What the next segment with the places `kept` [m] has room for; for prompts that wait if it may be open."""
        longest, left = int(self.positions[kept].max()), int(self.state.left()[kept].max())
        prompt = waiting.longest if self.open else 0
        # a row that joins late may have everything before it, next to one that nears the limit
        steps = min(SEGMENT, waiting.limit if prompt else left, max(waiting.whole - max(longest, prompt), ALIGNMENT))
        return Room(steps, longest, prompt)

    def join(self, waiting: Waiting, done: int, least: int) -> None:
        """Let prompts take the places of rows that have ended, after `done` tokens, if at least so many have."""
        free = (~self.state.going()).nonzero()[:, 0]
        waiting.on_ended(waiting.begun - len(self.state.rows) + len(free))
        if len(free) < least or not (self.open and waiting.left):
            return
        for places in free[: waiting.left].split(self.fewest_that_join()):
            first = waiting.begun
            prefill = waiting.taken_in(len(places))
            self.state.join(places, first)
            self._place(places, prefill, done)

    def fewest_that_join(self) -> int:
        """How many rows join at a time: taking in prompts is not recorded, so it is done for several together."""
        return max(1, int(len(self.state.rows) * JOINING_SHARE))

    def _place(self, places: Tensor, prefill: Prefill, done: int) -> None:
        """Put prompts in these places, at the left of the column that is written next."""
        for layer, new, window in zip(self.cache.layers, prefill.cache.layers, self.windows, strict=True):
            end, held = self.columns[window].begin + done, new.keys.shape[2]
            layer.keys[:, :, end - held : end].index_copy_(0, places, new.keys)
            layer.values[:, :, end - held : end].index_copy_(0, places, new.values)
        for columns in self.columns.values():
            held = columns.seen(prefill.mask.shape[1])
            columns.join(places, columns.begin + done, prefill.mask[:, prefill.mask.shape[1] - held :])
        drawn = self.state.take(head_logits(self.model, prefill.hidden), places)
        self.input_ids.index_copy_(0, places, drawn[:, None])
        self.positions.index_copy_(0, places, prefill.positions + 1)


def _prefilled_segment(model: PreTrainedModel, prefill: Prefill, drawn: Tensor, state: BatchState) -> Segment:
    """What the prefill left, as a segment without room; `drawn` [B] are the first tokens."""
    mask = added(prefill.mask, model.dtype)
    windows = [getattr(layer, "sliding_window", None) for layer in prefill.cache.layers]
    columns = {}
    for layer, window in zip(prefill.cache.layers, windows, strict=True):
        held = layer.keys.shape[2]
        columns[window] = Columns(mask[..., mask.shape[3] - held :], prefill.mask.new_full((1,), held), held, window)
    return Segment(model, state, drawn[:, None], prefill.positions + 1, prefill.cache, columns, windows)


def draw_replayed(model: PreTrainedModel, prefill: Prefill, drawn: Tensor, state: BatchState, waiting: Waiting) -> None:
    """Draw the rest of a batch after its prefill and its first tokens [B]; prompts that wait join as its rows end.

    Where `waiting` has prompts left at its end, these had better begin a batch of their own.
    """
    segment, done = _prefilled_segment(model, prefill, drawn, state), 0
    recording = Recording(state.generator)
    while True:
        segment.join(waiting, done, least=1)
        kept = state.going().nonzero()[:, 0]
        if len(kept) == 0:
            return
        if len(kept) == 1 < len(state.rows):
            # compilers make code of their own for one row
            kept = torch.cat([kept, (kept + 1) % len(state.rows)])
        room = segment.room(kept, waiting)
        segment = segment.next(kept, done, room)
        done = _drawn_segment(segment, room.steps, recording, waiting)


def _drawn_segment(segment: Segment, steps: int, recording: "Recording", waiting: Waiting) -> int:
    """Draw up to so many tokens of each row; fewer once all have ended. How many it were."""
    step, recorded = segment.step, steps >= LEAST_STEPS
    for number in range(steps):
        if number and number % LOOK_EVERY == 0:
            segment.join(waiting, number, least=segment.fewest_that_join())
            if not segment.state.going().any():
                return number
        # the first step does what must not happen during a recording: compile and look for the fastest kernels
        if number == 1 and recorded:
            recording.try_step(segment.step)
            step = recording.of(segment.step)
        else:
            step()
    return steps


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
