"""Hybrid sharding: ranks that hold several replicas of a model, each divided among some of them, as nodes do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opd_mcp.engine.training.rank_checkpoints import part_name
from tests.ranks.long.test_checkpoints import KINDS, near, same, whole_state
from tests.ranks.long.test_deaths import PACKAGE, SUMMARY, WORKER
from tests.ranks.long.test_gradients import ALL, CASES, EXACT

STEPS = 5
# `one`: a single row with a response, so that whole replicas have none
WAYS = {
    "even": {"data": "even", "cases": CASES[::5]},
    "odd": {"data": "odd", "cases": CASES[::3]},
    "one": {"data": "one", "cases": CASES[::7]},
    "full": {"data": "odd", "policy": "full", "cases": CASES[:2]},
    "adapter": {"data": "odd", "adapter": True, "cases": CASES[::7]},
    "reweighed": {"data": "odd", "reweigh": True, "cases": CASES[1::11]},
    "divided": {"data": "odd", "divided": True, "cases": CASES[::7]},
    "divided_one": {"data": "one", "divided": True, "cases": CASES[::9]},
    "divided_capped": {"data": "odd", "divided": True, "capped": 3, "cases": [CASES[12], ALL[1]], "tile_bytes": 4096},
    "divided_adapter": {"data": "odd", "divided": True, "adapter": True, "cases": CASES[::11]},
    "divided_reweighed": {"data": "odd", "divided": True, "reweigh": True, "cases": CASES[1::13]},
}
NARROW = {"what": "gradients", "data": "odd", "cases": CASES[:2], "dtype": "bfloat16"}
MEAN = {"what": "gradients", "data": "even", "cases": CASES[:3], "break": "mean"}


@pytest.fixture
def case(tmp_path: Path):
    """`case("name", …)`: a training of two replicas, checkpoints below the name and the model in `name.safetensors`."""

    def of(name: str, **changes):
        given = {"what": "training", "steps": STEPS, "replicas": 2, "folder": str(tmp_path / name)}
        return given | {"output": str(tmp_path / f"{name}.safetensors")} | changes

    return of


def told_by_worker(facts: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(WORKER), str(facts)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(("size", "replicas"), [(2, 2), (3, 3), (4, 2)])
def test_the_gradient_of_replicas_is_that_of_one_process(on_ranks, size: int, replicas: int, record_property) -> None:
    cases = [{"what": "gradients", "replicas": replicas, **way} for way in WAYS.values()]
    for answers in on_ranks(size, *cases, NARROW | {"replicas": replicas}, MEAN | {"replicas": replicas}):
        *exact, narrow, mean = answers
        worst = {name: max(answer.values()) for name, answer in zip(WAYS, exact, strict=True)}
        record_property("worst_relative_difference", max(worst.values()))
        assert {name: value for name, value in worst.items() if value > EXACT} == {}
        assert max(narrow.values()) <= 2e-2
        assert min(mean.values()) > 0.1  # a mean where a sum belongs is noticed


def test_two_replicas_of_two_continue_to_the_bit_and_stay_alike(on_ranks, case, tmp_path: Path) -> None:
    for kind, settings in {**KINDS, "divided": {"tied": False, "vocabulary": "divided"}}.items():
        cases = [case(f"{kind}-whole", **settings)]
        for stop in (1, 3, 4):
            name = f"{kind}-{stop}"
            cases += [case(name, stop=stop, **settings), case(name, **settings)]
        answers = on_ranks(4, *cases)
        for answer in answers[0]:
            assert answer["alerts"] == []
        for stopped, resumed in ((1, 2), (3, 4), (5, 6)):
            assert [rank[stopped]["stopped"] for rank in answers] == ["run_cancelled"] * 4
            assert len({rank[resumed]["resumed"] for rank in answers}) == 1
            assert answers[0][resumed]["resumed"] == (1, 3, 4)[stopped // 2]
            assert answers[0][resumed]["replicas"] == 2
            # both replicas hold the same at the end
            held = [rank[resumed]["held"] for rank in answers]
            assert held[:2] == held[2:]
            assert all(held)
        for stop in (1, 3, 4):
            assert same(tmp_path / f"{kind}-{stop}.safetensors", tmp_path / f"{kind}-whole.safetensors")


def test_the_state_goes_between_divisions_to_the_bit(on_ranks, case, tmp_path: Path) -> None:
    on_ranks(4, *(case(kind, stop=3, **settings) for kind, settings in KINDS.items()), case("on", stop=3))
    at = {kind: tmp_path / kind / "step-00000003" for kind in KINDS}
    original = {kind: whole_state(path) for kind, path in at.items()}
    with safe_open(at["tied"] / part_name(2, 4), framework="pt") as file:  # of the second replica
        assert all(key.startswith("random/") for key in file.keys())  # noqa: SIM118
    # 2 × 2 to two that hold it together, to two that each hold it, to four together, and back to 2 × 2
    for size, replicas in ((2, 1), (2, 2), (4, 1), (4, 2)):
        again = [case(kind, stop=3, renamed=True, replicas=replicas, **settings) for kind, settings in KINDS.items()]
        more = [case("on", replicas=1), case("whole")] if (size, replicas) == (4, 1) else []
        answers = on_ranks(size, *again, *more)[0]
        for kind, answer in zip(KINDS, answers, strict=False):
            assert answer["resumed"] == 3
            copied = whole_state(at[kind])
            assert copied.keys() == original[kind].keys()
            assert all(torch.equal(copied[name], original[kind][name]) for name in copied), (kind, size, replicas)
        if more:
            assert answers[-2]["alerts"] == ["resumed_elsewhere"]
            assert near(tmp_path / "on.safetensors", tmp_path / "whole.safetensors")


@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_rank_of_either_replica_ends_all_and_costs_no_bit(on_ranks, case, tmp_path: Path, victim: int) -> None:
    facts, given = tmp_path / "facts.json", {"victim": victim, "call": "check_fence", "nth": 3, "ranks": 4}
    of_rank = {"every": 1, "steps": 4}
    killed = {**given, "folder": str(tmp_path), "case": case("killed", **of_rank), "summary": SUMMARY}
    facts.write_text(json.dumps(killed))
    pids, ended = map(json.loads, told_by_worker(facts))
    assert (len(pids), ended["code"], ended["left"]) == (4, "rank_lost", [])
    assert f"Rank {victim} of 4" in ended["message"]
    answers = on_ranks(4, case("killed", **of_rank), case("whole", **of_rank))
    assert {rank[0]["resumed"] for rank in answers} <= {1, 2}
    assert same(tmp_path / "killed.safetensors", tmp_path / "whole.safetensors")


def test_a_suspended_rank_of_another_replica_is_named_after_the_timeout(case, tmp_path: Path) -> None:
    facts, given = tmp_path / "facts.json", {"victim": 3, "call": "metric", "nth": 2, "signal": "SIGSTOP", "ranks": 4}
    given |= {"group_seconds": 8.0, "folder": str(tmp_path), "case": case("suspended"), "summary": SUMMARY}
    facts.write_text(json.dumps(given))
    ended = json.loads(told_by_worker(facts)[-1])
    assert (ended["code"], ended["left"]) == ("rank_lost", [])
    assert "Rank 3 of 4" in ended["message"]
    assert "did not answer the others within 8 s: its process is suspended" in ended["message"]


def test_by_itself_a_training_on_two_nodes_has_a_replica_on_each(on_ranks, case, tmp_path: Path) -> None:
    auto = {"replicas": "auto", "nodes": 2}
    cases = [case("one", replicas="auto"), case("nodes", **auto), case("asked")]
    first = on_ranks(2, *cases, case("on", replicas=1, stop=3), case("on", **auto))[0]
    # a training that was divided among all devices continues so
    assert [answer["replicas"] for answer in first] == [None, 2, 2, None, None]
    assert first[-1]["alerts"] == []
    assert same(tmp_path / "on.safetensors", tmp_path / "one.safetensors")
    assert same(tmp_path / "nodes.safetensors", tmp_path / "asked.safetensors")
    assert near(tmp_path / "one.safetensors", tmp_path / "asked.safetensors")
