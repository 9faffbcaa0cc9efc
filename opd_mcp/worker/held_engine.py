"""The engine that was started, kept as long as it can serve what comes next.

A start takes minutes. A student that is its own teacher draws the rollouts and scores them: one engine does both. A
student that is trained meanwhile is served from one start too, by weights that the engine is given in place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from opd_mcp.engine.context import EngineAddress, EngineWish
from opd_mcp.worker.engines import MOST_LOGPROBS, ManagedEngine

Start = Callable[[EngineWish], AbstractContextManager[list[EngineAddress]]]


def address_of(engine: ManagedEngine) -> EngineAddress:
    """Where a stage finds a running engine."""
    return EngineAddress(
        engine.url,
        engine.key,
        engine.model.dtype,
        managed=True,
        check=engine.check,
        name=engine.model.served_name,
        reload=engine.reload,
    )


def serves(held: EngineWish, wish: EngineWish) -> bool:
    """Whether an engine that was started for one wish serves another as well.

    It has room for one token more than its longest row, which is the token that a scoring request draws.
    """
    return (
        (held.kind, held.model.resolve(), held.dtype) == (wish.kind, wish.model.resolve(), wish.dtype)
        and not (held.beside_training or wish.beside_training)
        and wish.length <= held.length + 1
        and wish.topk <= max(held.topk, MOST_LOGPROBS)
    )


@dataclass
class HeldEngine:
    """At most one engine at a time (on several devices one set), started by `start` and ended when nothing needs it."""

    start: Start
    following: str | None = None
    """The kind of engine that the phase after the present one asks for."""
    _wish: EngineWish | None = None
    _addresses: list[EngineAddress] = field(default_factory=list)
    _running: ExitStack = field(default_factory=ExitStack)

    def begin(self, kinds: Sequence[str | None]) -> None:
        """The phases still to come ask for these kinds of engine, the first of them now."""
        if self._wish is not None and (self._wish.beside_training or self._wish.kind != kinds[0]):
            self.release()
        self.following = kinds[1] if len(kinds) > 1 else None

    @contextmanager
    def serving(self, wish: EngineWish) -> Iterator[list[EngineAddress]]:
        """Where an engine answers that serves the wish, for the block's time; raises what `start` raises."""
        if self._wish is None or not (serves(self._wish, wish) or self._takes(wish)):
            self.release()
            self._addresses = self._running.enter_context(self.start(wish))
            self._wish = wish
        ended_well = False
        try:
            yield self._addresses
            ended_well = True
        finally:
            if not (ended_well and (wish.beside_training or self.following == wish.kind)):
                self.release()

    def _takes(self, wish: EngineWish) -> bool:
        """Whether the engine was given the wish's weights in place; one that does not take them must be ended."""
        held = self._wish
        if held is None or not held.beside_training or replace(held, model=wish.model, fresh=False) != wish:
            return False
        if not all(address.reload(wish.model) for address in self._addresses):
            return False
        self._wish = wish
        return True

    def release(self) -> None:
        """End the engine, if one is held; its memory is free then."""
        self._wish = None
        self._running.close()
