"""One engine for two phases that are served the same weights, ended as soon as nothing needs it."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from opd_mcp.engine.context import EngineAddress, EngineWish
from opd_mcp.worker.held_engine import HeldEngine, serves

DRAWS = EngineWish("vllm", Path("/models/one"), "float32", 100)
SCORES = replace(DRAWS, length=101, topk=8)


class Engines:
    """Counts what is started and what runs."""

    def __init__(self) -> None:
        self.started: list[EngineWish] = []
        self.running = 0

    @contextmanager
    def start(self, wish: EngineWish):
        self.started.append(wish)
        self.running += 1
        try:
            yield [EngineAddress(f"http://127.0.0.1:{len(self.started)}")]
        finally:
            self.running -= 1


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def held(engines) -> HeldEngine:
    return HeldEngine(engines.start)


def asked(held: HeldEngine, wish: EngineWish) -> str:
    with held.serving(wish) as [address]:
        return address.url


def test_drawing_and_scoring_with_the_same_weights_share_a_start(held, engines):
    held.begin(["vllm", "vllm", None])
    first = asked(held, DRAWS)
    assert engines.running == 1
    held.begin(["vllm", None])
    assert asked(held, SCORES) == first
    assert (engines.started, engines.running) == ([DRAWS], 0)


@pytest.mark.parametrize(
    "other",
    [
        replace(SCORES, model=Path("/models/other")),
        replace(SCORES, length=102),
        replace(SCORES, topk=21),
        replace(SCORES, dtype="bfloat16"),
        replace(SCORES, beside_training=True),
    ],
)
def test_what_the_engine_does_not_serve_is_started_after_its_end(held, engines, other):
    assert serves(DRAWS, SCORES)
    held.begin(["vllm", "vllm"])
    asked(held, DRAWS)
    held.begin(["vllm"])
    with held.serving(other):
        assert engines.running == 1
    assert (engines.started, engines.running) == ([DRAWS, other], 0)


@pytest.mark.parametrize("following", [None, "local", "sglang"])
def test_it_ends_with_its_phase_where_the_next_one_has_another_engine(held, engines, following):
    held.begin(["vllm", following])
    asked(held, DRAWS)
    assert engines.running == 0


def test_a_phase_that_needs_none_after_all_ends_it(held, engines):
    """Such as a score that another run has finished meanwhile, and then the training."""
    held.begin(["vllm", "vllm", None])
    asked(held, DRAWS)
    held.begin(["vllm", None])
    assert engines.running == 1
    held.begin([None])
    assert engines.running == 0


def test_a_phase_that_fails_ends_it(held, engines):
    held.begin(["vllm", "vllm"])
    with pytest.raises(ZeroDivisionError), held.serving(DRAWS):
        raise ZeroDivisionError
    assert engines.running == 0
    held.begin(["vllm"])
    asked(held, DRAWS)
    assert len(engines.started) == 2
