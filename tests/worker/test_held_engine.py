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
        self.given: list[Path] = []
        self.takes = True

    def reload(self, path: Path) -> bool:
        self.given.append(path)
        return self.takes

    @contextmanager
    def start(self, wish: EngineWish):
        self.started.append(wish)
        self.running += 1
        try:
            yield [EngineAddress(f"http://127.0.0.1:{len(self.started)}", reload=self.reload)]
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


FOLLOWS = replace(DRAWS, beside_training=True)
LATER = replace(FOLLOWS, model=Path("/models/later"))


def test_a_student_in_training_is_given_to_one_engine_again_and_again(held, engines):
    held.begin(["vllm", None])
    first = asked(held, FOLLOWS)
    assert asked(held, LATER) == first
    assert asked(held, replace(LATER, model=Path("/models/last"))) == first
    assert (engines.started, engines.given) == ([FOLLOWS], [LATER.model, Path("/models/last")])
    held.begin(["vllm"])
    assert engines.running == 0, "the next phase loads a model before it asks for its own engine"


def test_an_engine_that_takes_no_weights_is_started_again(held, engines):
    engines.takes = False
    held.begin(["vllm"])
    asked(held, FOLLOWS)
    asked(held, LATER)
    assert (engines.started, engines.running) == ([FOLLOWS, LATER], 1)
    held.release()
    assert engines.running == 0


def test_one_with_too_little_room_is_given_nothing(held, engines):
    held.begin(["vllm"])
    asked(held, FOLLOWS)
    longer = replace(LATER, length=200)
    asked(held, longer)
    assert (engines.started, engines.given) == ([FOLLOWS, longer], [])
