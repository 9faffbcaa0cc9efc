"""A server that becomes another teacher while a cache is built: found out, and only what was not proven is lost."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.context import SilentReporter
from opd_mcp.engine.scoring.connection import Access, Patience
from opd_mcp.engine.scoring.remote import open_remote, remote_rescorer
from opd_mcp.identity.lineage import read_manifest
from opd_mcp.schemas.errors import ConsistencyError, OpdError
from opd_mcp.schemas.identity import RemoteTeacher

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
KEY = "a-key"
SCORE = sys.modules[stages.score.__module__]
QUICK = Patience(timeout_s=20, attempts=6, first_pause_s=0.01, longest_pause_s=0.05, proven_s=0)
SHARDS, SHARD_ROWS = 5, 8


def load_proxy():
    spec = importlib.util.spec_from_file_location("fault_proxy", Path(__file__).with_name("fault_proxy.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FaultProxy


@dataclass
class Address:
    """One port at which models are served one after the other, as a server that is restarted."""

    serve_model: Callable[..., Any]
    first: Any = None
    now: Any = None

    def serve(self, model: str, *, lies: bool = False) -> None:
        """End what is served and serve this model; with `lies` it says that it is the first one."""
        port = 0 if self.now is None else self.now.port
        if self.now is not None:
            self.now.close()
        self.now = self.serve_model(model, KEY, port=port)
        teacher = self.now.service.teacher
        self.first = self.first or teacher.identity
        name = {"name": "teacher"}
        told = self.first if lies else teacher.identity.model_copy(update=name)
        self.now.service.teacher = replace(teacher, identity=told)


@pytest.fixture
def address(serve_model) -> Iterator[Address]:
    one = Address(serve_model)
    one.serve("teacher")
    yield one
    one.now.close()


@pytest.fixture
def proxy(address) -> Iterator:
    """A proxy before the address, which can lose a connection."""
    served = load_proxy()(address.now.port, lambda number: None)
    yield served
    served.shutdown()
    served.server_close()


@dataclass
class AfterShards(SilentReporter):
    """Does something once when so many shards are scored."""

    shards: int
    act: Callable[[], None]
    seen: list[int] = field(default_factory=list)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.seen.append(done)
        if len(self.seen) == self.shards:
            self.act()


@pytest.fixture
def over_http(build, drawn, monkeypatch):
    """`over_http(url, **changes)`: a cache whose teacher is at the URL, one request at a time."""
    monkeypatch.setattr(SCORE, "Access", partial(Access, patience=QUICK))

    def built(url: str, *, reporter: SilentReporter | None = None, concurrency: int = 1) -> Path:
        context = build.context(teacher_key=KEY, reporter=reporter or SilentReporter())
        remote = RemoteTeacher(name="teacher", url=url)
        recipe = build.scoring(concurrency=concurrency)
        return build.cache(drawn, "cache", teacher=None, remote=remote, context=context, recipe=recipe)

    return built


def finished_shards(cache: Path) -> dict[str, int]:
    return {note.name: note.stat().st_mtime_ns for note in sorted(cache.glob("*.done.json"))}


def require_whole(cache: Path, finished: Path) -> None:
    ours, theirs = read_cache(cache)[1], read_cache(finished)[1]
    assert ours.response_ids.tolist() == theirs.response_ids.tolist()
    difference = ours.columns["teacher_logprobs"] - theirs.columns["teacher_logprobs"]
    assert abs(difference).max() <= 1e-4, "no row is another teacher's"


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_teacher_replaced_between_two_shards(address, over_http, build, finished, lies, concurrency) -> None:
    reporter = AfterShards(2, lambda: address.serve("teacher_other_style", lies=lies))
    with pytest.raises(ConsistencyError, match=r"teacher_untrue.*any more.*Call resume_run") as caught:
        over_http(address.now.url, reporter=reporter, concurrency=concurrency)
    assert ("log-probs of the probe" if lies else "it now serves teacher@") in caught.value.message
    kept = finished_shards(build.root / "cache")
    assert len(kept) == 2
    address.serve("teacher")
    listening = AfterShards(SHARDS, lambda: assert_kept(build.root / "cache", kept))
    require_whole(over_http(address.now.url, reporter=listening, concurrency=concurrency), finished)
    assert len(listening.seen) == SHARDS


def assert_kept(cache: Path, kept: dict[str, int]) -> None:
    assert finished_shards(cache).items() >= kept.items(), "proven shards are not scored again"


def test_a_teacher_that_is_another_only_while_a_connection_is_lost(
    address, proxy, serve_model, over_http, build, finished
) -> None:
    """It is the first one again when the shard ends: only the probe over the new connection can tell."""
    other = serve_model("teacher_other_style", KEY)
    other.service.teacher = replace(other.service.teacher, identity=address.first)
    first = address.now.port

    def faults(number: int) -> str | None:
        if number == SHARD_ROWS + 4:
            proxy.upstream = other.port
            return "refused"
        if number == SHARD_ROWS + 6:
            proxy.upstream = first
        return None

    proxy.faults = faults
    try:
        with pytest.raises(ConsistencyError, match=r"teacher_untrue.*log-probs of the probe"):
            over_http(proxy.url)
        assert list(finished_shards(build.root / "cache")) == ["shard-00000.parquet.done.json"]
        proxy.upstream, proxy.faults = first, lambda number: None
        require_whole(over_http(proxy.url), finished)
    finally:
        other.close()


def test_a_teacher_replaced_in_the_last_shard_without_a_lost_connection(
    address, proxy, serve_model, over_http, build, finished
) -> None:
    other = serve_model("teacher_other_style", KEY)
    other.service.teacher = replace(other.service.teacher, identity=address.first)
    first = address.now.port

    def faults(number: int) -> str | None:
        if number == SHARDS * SHARD_ROWS:  # the last row of all
            proxy.upstream = other.port
        return None

    proxy.faults = faults
    try:
        with pytest.raises(ConsistencyError, match="teacher_untrue"):
            over_http(proxy.url)
        assert len(finished_shards(build.root / "cache")) == SHARDS - 1
        assert not (build.root / "cache" / "manifest.json").exists()
        proxy.upstream, proxy.faults = first, lambda number: None
        require_whole(over_http(proxy.url), finished)
    finally:
        other.close()


def test_a_teacher_replaced_after_the_last_row_is_found_out_before_the_manifest(address, over_http, build) -> None:
    reporter = AfterShards(SHARDS, lambda: address.serve("teacher_other_style"))
    with pytest.raises(ConsistencyError, match="teacher_untrue"):
        over_http(address.now.url, reporter=reporter)
    assert len(finished_shards(build.root / "cache")) == SHARDS
    assert not (build.root / "cache" / "manifest.json").exists()


def test_a_restart_of_the_same_teacher_is_no_difference(address, over_http, finished) -> None:
    reporter = AfterShards(2, lambda: address.serve("teacher"))
    require_whole(over_http(address.now.url, reporter=reporter, concurrency=4), finished)


def test_lines_are_opened_when_they_are_needed(address) -> None:
    remote = RemoteTeacher(name="teacher", url=address.now.url)
    teacher = open_remote(remote, EXAMPLE / "student", concurrency=3, access=Access(KEY, QUICK))
    try:
        teacher.prove()
        assert [(line.server.opened, line.proven) for line in teacher.connections] == [(1, 1), (0, 0), (0, 0)]
    finally:
        teacher.close()


def test_a_verification_whose_server_changes_is_told_to_verify_again(address) -> None:
    remote = RemoteTeacher(name="teacher", url=address.now.url)
    teacher = open_remote(remote, EXAMPLE / "student", access=Access(KEY, QUICK, resumes=False))
    try:
        address.serve("teacher_other_style", lies=True)
        with pytest.raises(ConsistencyError, match=r"teacher_untrue.*then verify again\.") as caught:
            teacher.prove()
        assert caught.value.call is None
    finally:
        teacher.close()


def test_verifying_by_another_server_is_refused_by_the_cache_s_own_probe(address, over_http) -> None:
    cache = over_http(address.now.url)
    manifest = read_manifest(cache)
    rows = read_cache(cache)[1]
    remote = RemoteTeacher(name="teacher", url=address.now.url)
    rescore = remote_rescorer(remote, cache / "tokenizer", KEY, manifest.teacher)
    assert abs(rescore(rows, 0) - rows.columns["teacher_logprobs"]).max() <= 1e-4
    address.serve("teacher_other_style", lies=True)
    with pytest.raises(OpdError, match=r"teacher_untrue.*than the cache's teacher gave"):
        rescore(rows, 0)
