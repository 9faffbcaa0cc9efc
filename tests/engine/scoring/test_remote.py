"""A teacher over HTTP: equal to the local one, patient with faults, sure of whom it talks to, silent about its key."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache, read_rollouts
from opd_mcp.engine.cache.verify import verified
from opd_mcp.engine.context import SilentReporter
from opd_mcp.engine.scoring import server as scorer
from opd_mcp.engine.scoring.connection import Access, Patience
from opd_mcp.engine.scoring.remote import open_remote
from opd_mcp.engine.scoring.server import TeacherService
from opd_mcp.identity.lineage import read_manifest
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, IntegrityError, OpdError
from opd_mcp.schemas.identity import RemoteTeacher

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
KEY = "a-secret-that-no-file-may-hold"
TRANSPORT_FAULTS = ["refused", "500", "429", "stalled", "truncated", "half_json"]
SCORE = sys.modules[stages.score.__module__]
QUICK = Patience(timeout_s=0.8, attempts=4, first_pause_s=0.01, longest_pause_s=0.05, proven_s=0)


def load_proxy():
    spec = importlib.util.spec_from_file_location("fault_proxy", Path(__file__).with_name("fault_proxy.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FaultProxy


@pytest.fixture(scope="module")
def server(serve_model) -> Iterator:
    server = serve_model("teacher", KEY)
    yield server
    server.close()


@pytest.fixture
def proxy(server):
    """`proxy(faults)`: a proxy before the server; `faults` maps the number of a POST to a fault."""
    proxies = []

    def started(faults=lambda number: None):
        proxies.append(load_proxy()(server.port, faults))
        return proxies[-1]

    yield started
    for one in proxies:
        one.shutdown()
        one.server_close()


@pytest.fixture
def over_http(build, drawn, monkeypatch):
    """`over_http(url, name)`: a cache whose teacher is at the URL, asked with little patience."""
    monkeypatch.setattr(SCORE, "Access", partial(Access, patience=QUICK))

    def built(url: str, name: str = "cache", **changes: object) -> Path:
        remote = RemoteTeacher(name=changes.pop("teacher_name", "teacher"), url=url)
        reporter = changes.pop("reporter", SilentReporter())
        context = build.context(teacher_key=changes.pop("key", KEY), reporter=reporter)
        rollouts = changes.pop("rollouts", drawn)
        return build.cache(rollouts, name, teacher=None, remote=remote, context=context, **changes)

    return built


def remote_of(port: int, **changes: object):
    given = {"tokenizer": EXAMPLE / "student", "access": Access(KEY, QUICK)} | changes
    return open_remote(RemoteTeacher(name="teacher", url=f"http://127.0.0.1:{port}"), **given)


def test_http_equals_local_to_a_ten_thousandth_of_a_nat(server, over_http, finished):
    cache = over_http(server.url)
    (ours, theirs), (mine, local) = read_cache(cache), read_cache(finished)
    assert np.array_equal(theirs.response_ids, local.response_ids)
    for name in ("teacher_logprobs", "topk_logprobs"):
        assert np.abs(theirs.columns[name] - local.columns[name]).max() <= 1e-4
    assert (theirs.columns["topk_ids"] == local.columns["topk_ids"]).mean() > 0.999
    assert ours.teacher.remote == "served"
    assert ours.teacher.same_model(mine.teacher)
    assert len(ours.teacher.probe) == 15
    assert verified(cache).problems == []


@pytest.mark.parametrize("fault", [*TRANSPORT_FAULTS, "short", "nan", "other_ids"])
def test_a_fault_now_and_then_changes_nothing(fault, proxy, over_http, finished):
    spoiled = 7 if fault != "stalled" else 30
    served = proxy(lambda number: fault if number > 2 and number % spoiled == 0 else None)
    served.spoils_probes = fault in TRANSPORT_FAULTS
    theirs, local = read_cache(over_http(served.url))[1], read_cache(finished)[1]
    assert np.array_equal(theirs.response_ids, local.response_ids)
    assert np.abs(theirs.columns["teacher_logprobs"] - local.columns["teacher_logprobs"]).max() <= 1e-4


@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
def test_a_fault_that_stays_is_one_error_and_the_next_build_goes_on(fault, proxy, over_http, build, finished):
    served = proxy(lambda number: fault if number > 12 else None)
    with pytest.raises(OpdError, match="teacher_unreachable") as caught:
        over_http(served.url)
    assert KEY not in str(caught.value)
    cache = build.root / "cache"
    assert not (cache / "manifest.json").exists()
    assert not list(cache.glob(".*")), "nothing half-written"
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.parquet")}
    assert len(kept) == 1
    served.faults = lambda number: None
    over_http(served.url)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert verified(cache).problems == []
    theirs, local = read_cache(cache)[1], read_cache(finished)[1]
    assert np.array_equal(theirs.response_ids, local.response_ids)
    assert np.abs(theirs.columns["teacher_logprobs"] - local.columns["teacher_logprobs"]).max() <= 1e-4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("short", "another length"), ("nan", "not finite"), ("other_ids", "other tokens than those sent")],
)
def test_answers_that_stay_wrong_fail_by_their_commonest_reason(fault, reason, proxy, over_http, build):
    served = proxy(lambda number: fault if number > 2 else None)
    with pytest.raises(OpdError, match=f"bad_rows.*{reason}"):
        over_http(served.url)
    assert not (build.root / "cache" / "manifest.json").exists()
    served.faults = lambda number: None
    assert read_manifest(over_http(served.url)).hygiene.quarantined == {}


def test_the_key_is_in_no_file_and_no_message(server, over_http, build):
    over_http(server.url)
    assert not [path for path in build.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    with pytest.raises(OpdError, match=r"teacher_refused.*OPD_TEACHER_KEY") as caught:
        over_http(server.url, "refused", key="another-secret")
    assert "another-secret" not in repr(caught.value)
    with pytest.raises(ArgumentError, match="invalid_argument") as caught:
        over_http("http://user:secret-in-url@127.0.0.1:1/", "refused")
    assert "secret-in-url" not in str(caught.value)


def test_a_server_that_shows_the_key_in_its_answers_does_not_spread_it(proxy, over_http, build):
    served = proxy(lambda number: "echo" if number > 4 else None)
    with pytest.raises(OpdError, match=r"teacher_refused.*HTTP 403.*who are you") as caught:
        over_http(served.url)
    assert KEY not in repr(caught.value)
    assert not [path for path in build.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_no_more_requests_at_a_time_than_the_recipe_says(proxy, over_http, build):
    served = proxy()
    over_http(served.url, recipe=build.scoring(concurrency=3))
    assert 1 < served.most_at_a_time <= 3


def test_a_row_that_the_server_has_no_number_for_is_left_out_not_the_build(proxy, over_http, build, monkeypatch):
    rollouts = build.rollouts("many", recipe=build.recipe.rollout.model_copy(update={"count": 120, "shard_rows": 60}))
    poisoned = read_rollouts(rollouts).response(7).tolist()
    real = scorer.score_sequences

    def with_nan(teacher, sequences, **given):
        scores = real(teacher, sequences, **given)
        for row in range(len(sequences)):
            if sequences.response(row).tolist() == poisoned:
                scores.logprobs[sequences.response_offsets[row]] = np.nan
        return scores

    monkeypatch.setattr(scorer, "score_sequences", with_nan)
    count = sum(read_rollouts(rollouts).response(row).tolist() == poisoned for row in range(120))
    assert count == 1
    manifest = read_manifest(over_http(proxy().url, rollouts=rollouts))
    assert manifest.hygiene.quarantined == {"log-prob is not finite": 1}


def test_another_tokenizer_on_the_server_is_named_by_its_first_token(server, tmp_path):
    student = Path(shutil.copytree(EXAMPLE / "student", tmp_path / "student"))
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["@"] = tokenizer["model"]["vocab"].pop("7")
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*teacher has '7', student has '@'"):
        remote_of(server.port, tokenizer=student)
    tokenizer["model"]["vocab"]["@"] = tokenizer["model"]["vocab"].pop("#")
    tokenizer["model"]["vocab"]["7"] = 900
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*at id \d+: teacher has"):
        remote_of(server.port, tokenizer=student)


def test_a_server_whose_tokens_are_not_those_of_its_hash_is_untrue(server, monkeypatch):
    identity = server.service.teacher.identity.model_copy(update={"tokenizer": "0" * 64})
    models = server.service.models()
    models["data"][0]["opd_identity"] = identity.to_dict()
    monkeypatch.setattr(server.service, "models", lambda: models)
    with pytest.raises(ConsistencyError, match=r"teacher_untrue.*not those of the hash"):
        remote_of(server.port)


def test_a_server_of_another_model_is_found_out(server, over_http):
    with pytest.raises(ConsistencyError, match="teacher_untrue"):
        over_http(server.url, teacher_name="somebody-else")
    with pytest.raises(ConsistencyError, match="teacher_untrue"):
        remote_of(server.port, files=EXAMPLE / "teacher_other_style")


def test_a_teacher_swapped_behind_the_url_is_refused_at_resume(proxy, serve_model, over_http, stopping):
    served = proxy()
    with pytest.raises(OpdError, match="run_cancelled"):
        over_http(served.url, reporter=stopping(after=2))
    other = serve_model("teacher_other_style", KEY)
    try:
        other.service.teacher.identity.__dict__["name"] = "teacher"
        served.upstream = other.port
        with pytest.raises(IntegrityError, match=r"input_changed.*another teacher"):
            over_http(served.url, allow_teacher_mismatch=True)
    finally:
        other.close()


def test_a_server_that_applies_a_temperature_is_refused(server, monkeypatch):
    real, entry = TeacherService.jobs, scorer._entry

    def heated(self, body):
        self.heat = body.get("temperature", 1.0)
        return real(self, body)

    def scaled(token, logprob, best):
        heat = server.service.heat
        return entry(token, logprob / heat, (best[0], [value / heat for value in best[1]]))

    monkeypatch.setattr(TeacherService, "jobs", heated)
    with monkeypatch.context() as patched:
        patched.setattr(scorer, "_entry", scaled)
        with pytest.raises(ConsistencyError, match=r"teacher_untrue.*temperature"):
            remote_of(server.port)
    remote_of(server.port).close()
