"""Several servers of one model side by side: they share the rows, and one that is lost gives its rows back."""

import importlib.util
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine.cache.manifest import read_cache, read_record, read_rollouts
from opd_mcp.engine.context import SilentReporter
from opd_mcp.engine.scoring import lines
from opd_mcp.engine.scoring.connection import Access, Server
from opd_mcp.engine.scoring.lines import Line
from opd_mcp.schemas.errors import ConsistencyError, ResourceError, RunError

ROWS = {"count": 16, "shard_rows": 8}
COMPARED = 8  # rows that each server draws for the comparison with the model here


class Alerts(SilentReporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def alert(self, code: str, message: str) -> None:
        assert code == "engine_lost"
        self.told.append(message)


@pytest.fixture(scope="module")
def module():
    file = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"
    spec = importlib.util.spec_from_file_location("stand_in_engine", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answers(module, student):
    return module.model_answers(student)


@pytest.fixture
def server(module, answers, student):
    """`server(answer, **options)`: a stand-in before the student; `answer(body, real)` may do otherwise."""
    opened = []

    def made(answer=lambda body, real: real(body), *, real=answers, **options):
        wire = module.Wire(student.name, lambda body: answer(body, real), **options)
        opened.append(wire.serve_in_background())
        return wire

    yield made
    for wire in opened:
        wire.close()


@pytest.fixture
def drawn_by(build):
    """`drawn_by(*servers)`: rollouts that they draw, and the alerts."""

    def made(*servers, name="rollouts"):
        reporter = Alerts()
        urls = [wire if isinstance(wire, str) else wire.url for wire in servers]
        section = build.recipe.rollout.model_copy(update={"engine": ",".join(urls), **ROWS})
        return build.rollouts(name, recipe=section, context=build.context(reporter=reporter)), reporter.told

    return made


def draws(body: dict) -> bool:
    """Whether a request is for a row, not a probe."""
    return bool(body.get("return_token_ids")) and body["temperature"] != 0.5


@pytest.fixture
def alone(kept, server, drawn_by):
    """The rows that one server draws."""
    if not kept:
        kept.append(read_rollouts(drawn_by(server(), name="alone")[0]))
    return kept[0]


@pytest.fixture(scope="module")
def kept():
    return []


def same_rows(rollouts: Path, theirs) -> bool:
    ours = read_rollouts(rollouts)
    return np.array_equal(ours.response_ids, theirs.response_ids) and np.allclose(
        ours.columns["behaviour_logprobs"], theirs.columns["behaviour_logprobs"], atol=1e-5
    )


def test_two_servers_share_the_rows_and_each_is_compared_with_the_model_here(server, drawn_by, alone):
    first, second = server(), server()
    rollouts, told = drawn_by(first, second)
    taken = [sum(map(draws, wire.asked)) for wire in (first, second)]
    assert min(taken) > COMPARED, "each drew the rows of the comparison, and some of the others"
    assert sum(taken) == 16 + 2 * COMPARED
    assert told == []
    assert read_record(rollouts).engine_gap.mean <= 1e-5
    assert same_rows(rollouts, alone)


def test_one_that_dies_gives_its_rows_back(server, drawn_by, alone):
    def dying(body, real):
        if draws(body) and sum(map(draws, first.asked)) > COMPARED + 2:
            first.dead.set()
        return real(body)

    first, second = server(dying), server()
    rollouts, told = drawn_by(first, second)
    assert first.dead.is_set()
    assert [first.url in text for text in told] == [True]
    assert same_rows(rollouts, alone)


def test_one_that_holds_its_requests_for_ever_is_found_by_its_health(server, drawn_by, alone, monkeypatch):
    monkeypatch.setattr(lines, "LOOK_SECONDS", 0.1)
    over = threading.Event()

    def holding(body, real):
        if draws(body) and sum(map(draws, first.asked)) > COMPARED + 2:
            first.dead.set()  # no answer to a question for its health either
            over.wait(60)
        return real(body)

    first, second = server(holding), server()
    try:
        rollouts, told = drawn_by(first, second)
    finally:
        over.set()
    assert [first.url in text for text in told] == [True]
    assert same_rows(rollouts, alone)


def test_one_that_comes_back_gets_rows_again(server, drawn_by, alone, monkeypatch):
    monkeypatch.setattr(lines, "LOOK_SECONDS", 0.1)
    back, lost, lose = threading.Event(), threading.Event(), lines.Lines._lose

    def losing(self, line, error):
        lose(self, line, error)
        lost.set()

    def dying(body, real):
        if draws(body) and sum(map(draws, first.asked)) == COMPARED + 3:
            first.dead.set()
        return real(body)

    def waiting(body, real):
        # From the loss on, only once the other answers again.
        if first.dead.is_set() and draws(body) and not back.is_set():
            back.set()
            assert lost.wait(60)
            first.dead.clear()
        if back.is_set() and draws(body):
            while first.dead.is_set():
                over.wait(0.02)
        return real(body)

    monkeypatch.setattr(lines.Lines, "_lose", losing)
    over = threading.Event()
    first, second = server(dying), server(waiting)
    rollouts, told = drawn_by(first, second)
    assert [first.url in text for text in told] == [True, True]
    assert told[1].endswith("answers again.")
    assert same_rows(rollouts, alone)


def test_when_all_are_lost_for_long_it_is_one_error(server, drawn_by, build, monkeypatch):
    monkeypatch.setattr(lines, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lines, "RETURN_SECONDS", 0.3)

    def dying(body, real):
        if draws(body) and sum(map(draws, first.asked)) > COMPARED + 2:
            first.dead.set()
            second.dead.set()
        return real(body)

    first, second = server(dying), server()
    with pytest.raises(ResourceError, match="engine_unreachable"):
        drawn_by(first, second)


def test_one_that_is_not_there_at_the_start_is_left_out_and_told(server, drawn_by):
    alone = server()
    _, told = drawn_by("http://127.0.0.1:9", alone)
    assert [text.startswith("http://127.0.0.1:9 is left out.") for text in told] == [True]
    with pytest.raises(ResourceError, match="engine_unreachable"):
        drawn_by("http://127.0.0.1:9", "http://127.0.0.1:19", name="neither")


def test_servers_that_are_not_alike_are_refused(server, drawn_by, module, build):
    with pytest.raises(ConsistencyError, match=r"engine_untrue.*0\.32\.0.*0\.31\.0.*not alike"):
        drawn_by(server(), server(version="0.31.0"))
    with pytest.raises((ConsistencyError, RunError), match=r"engine_untrue|engine_disagrees"):
        drawn_by(server(), server(real=module.model_answers(build.teacher)), name="others")


def test_a_busy_server_is_asked_for_less_at_a_time(server, drawn_by, module, student):
    lock, inside, refused = threading.Lock(), [0], [0]

    def narrow(body, real):
        with lock:
            inside[0] += 1
            busy = inside[0] > 2
            refused[0] += busy
        try:
            return (429, {"error": {"message": "too many requests"}}) if busy else real(body)
        finally:
            with lock:
                inside[0] -= 1

    own = module.model_answers(student)  # the shared one may still answer what earlier tests' clients gave up
    rollouts, _ = drawn_by(server(narrow, real=own))
    assert 0 < refused[0] < 50, "fewer than each row's every try"
    assert read_record(rollouts).statistics.rows == 16


def test_several_servers_score(module, server, build, drawn, finished):
    teacher = module.model_answers(build.teacher)
    first, second = server(real=teacher), server(real=teacher)
    section = build.scoring(engine=f"{first.url},{second.url}")
    manifest, rows = read_cache(build.cache(drawn, "cache", recipe=section))
    _, local = read_cache(finished)
    assert np.abs(rows.columns["teacher_logprobs"] - local.columns["teacher_logprobs"]).max() <= 1e-4
    assert manifest.scorer_gap.mean <= 1e-5
    assert min(len(first.asked), len(second.asked)) > 20


@pytest.mark.parametrize("metrics", ["told", "of something else", "none"])
def test_an_engine_whose_queue_is_long_is_sent_fewer_rows_at_a_time(server, build, monkeypatch, metrics):
    """It works on two at a time, and says how many wait: the first eight until they are all there."""
    monkeypatch.setattr(lines, "LOOK_SECONDS", 0.05)
    room, known, changed = threading.Semaphore(2), threading.Event(), threading.Lock()
    counts = {"sent": 0, "working": 0, "asked": 0, "told": 0}
    most = []

    def answering(body, real):
        if not draws(body):
            return real(body)
        with changed:
            counts["sent"] += 1
            most.append(counts["sent"] if known.is_set() else 0)
        with room:
            counts["working"] += 1
            known.wait(30)
            answer = real(body)
            counts["working"] -= 1
        with changed:
            counts["sent"] -= 1
        return answer

    def waiting():
        counts["asked"] += 1
        found = counts["sent"] - counts["working"]
        if found >= COMPARED - 2:
            counts["told"] += 1
            if counts["told"] > 1:  # who asks again has read the answer before
                known.set()
        return found

    wire = server(answering)
    if metrics == "told":
        wire.waiting = waiting
    else:
        known.set()
        if metrics == "of something else":
            monkeypatch.setattr(wire, "waiting", waiting)
            monkeypatch.setattr(lines, "WAITING", re.compile(rb"^other ([0-9]+)$", re.MULTILINE))
    section = build.recipe.rollout.model_copy(
        update={"engine": wire.url, "count": 24, "shard_rows": 24, "batch_size": 12}
    )
    read_rollouts(build.rollouts(metrics, recipe=section))
    if metrics == "told":
        assert max(most) <= 9, "of twelve connections"
    elif metrics == "of something else":
        assert counts["asked"] == 1, "it is not asked again"


def test_an_engine_that_is_not_started_again_leaves_its_rows_to_the_others_until_all_are_so():
    gone, told = set(), []

    def engine(url: str) -> Line:
        def check() -> None:
            if url in gone:
                raise ResourceError("engine_failed", f"{url} has ended too often.", fix="Read the log.")

        return Line(Server(url, Access(role="engine", check=check)))

    def ask(line: Line) -> str:
        line.server.require_going()
        return line.server.url

    first, second = "http://127.0.0.1:1", "http://127.0.0.1:2"
    both = lines.Lines([engine(first), engine(second)], lambda line: None, told.append)
    try:
        for line in both.all:
            line.proven = line.server.opened
        assert both.served(ask) == first
        gone.add(first)
        assert [both.served(ask), both.served(ask)] == [second, second]
        assert len(told) == 1
        assert first in told[0]
        gone.add(second)
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"engine_failed.*:2 has ended too often"):
                both.served(ask)
    finally:
        both.close()
