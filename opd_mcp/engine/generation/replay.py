"""Decoding on CUDA: one step is recorded as a graph and replayed, so that the GPU does not wait for Python.

A step is some thousand short kernels, which Python launches more slowly than the GPU runs them. A graph has fixed
shapes, so keys and values lie in buffers with room for the next SEGMENT tokens. At a segment's end rows that have ended
are dropped, room is made, and the step is recorded again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd_mcp.engine.generation.batch_state import BatchState
from opd_mcp.engine.models.attention import packs
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.kv_cache import FixedCache, FixedLayer, RoomyLayer, continued

logger = logging.getLogger(__name__)

SEGMENT = 256
# attention kernels want the mask's rows aligned
ALIGNMENT = 64
# steps between two checks whether all rows have ended; a check waits for the GPU
LOOK_EVERY = 16
# below this a recording costs more than it saves
LEAST_STEPS = 8


def replays(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether the steps after this cache's prefill can be recorded: CUDA, our attention, no layer with a window."""
    return model.device.type == "cuda" and packs(model) and all(type(layer) is RoomyLayer for layer in cache.layers)


@dataclass
class Segment:
    """The buffers of steps with the same shapes: n rows, room for the keys and values of E tokens.

    `mask` [n, 1, 1, E] is added to the scores; `input_ids` and `positions` [n, 1] are those of the next token.
    """

    model: PreTrainedModel
    state: BatchState
    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    cursor: Tensor
    cache: DynamicCache

    def step(self) -> None:
        """Draw the next token of each row."""
        self.mask.index_fill_(3, self.cursor, 0.0)
        hidden = continued(self.model, self.cache, self.input_ids, self.mask, self.positions)
        drawn = self.state.take(head_logits(self.model, hidden[:, -1]))
        self.input_ids.copy_(drawn[:, None])
        self.positions += 1
        self.cursor += 1

    def next(self, kept: Tensor, filled: int, steps: int) -> "Segment":
        """The rows `kept` [m], the states of their first `filled` tokens, and room for `steps` more."""
        extent = -(-(filled + steps) // ALIGNMENT) * ALIGNMENT
        mask = self.mask.new_full((len(kept), 1, 1, extent), -torch.inf)
        mask[..., :filled] = self.mask[kept, :, :, :filled]
        cache = FixedCache()
        for layer in self.cache.layers:
            keys, values = (_with_room(states, kept, filled, extent) for states in (layer.keys, layer.values))
            cache.layers.append(FixedLayer(keys, values, self.cursor))
            # the caller still has the old cache: so one layer is held twice at a time, not all
            layer.keys = layer.values = keys.new_empty(0)
        self.state.keep(kept)
        return Segment(self.model, self.state, self.input_ids[kept], self.positions[kept], mask, self.cursor, cache)


def _with_room(states: Tensor, kept: Tensor, filled: int, extent: int) -> Tensor:
    # zeros, since a masked token still has a share of 0 in a sum
    room = states.new_zeros(len(kept), states.shape[1], extent, states.shape[3])
    room[:, :, :filled] = states[kept, :, :filled]
    return room


def draw_replayed(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, positions: Tensor, drawn: Tensor, state: BatchState
) -> None:
    """Draw the rest of a batch after its prefill: prompt mask [B, L], last positions [B, 1], first tokens [B]."""
    filled, done = mask.shape[1], 1
    added = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(mask == 0, -torch.inf)[:, None, None]
    cursor = torch.tensor([filled], device=model.device)
    segment = Segment(model, state, drawn[:, None], positions + 1, added, cursor, cache)
    recording = Recording(state.generator)
    while done < state.limit:
        kept = state.going().nonzero()[:, 0]
        if len(kept) == 0:
            return
        if len(kept) == 1 < len(state.rows):
            # compilers make code of their own for one row
            kept = torch.cat([kept, (kept + 1) % len(state.rows)])
        steps = min(SEGMENT, state.limit - done)
        segment = segment.next(kept, filled, steps)
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
        filled, done = filled + steps, done + steps


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
