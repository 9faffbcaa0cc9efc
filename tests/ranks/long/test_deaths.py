"""SIGKILL for each rank and the worker, at every point that rank 0 tells of: all end, what is saved is whole."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import opd_mcp

WORKER = Path(__file__).parents[2] / "stand_ins" / "rank_worker.py"
PACKAGE = Path(opd_mcp.__file__).parents[1]
STEPS = 6
SUMMARY = {"steps": 1, "seconds": 1.0, "seconds_per_step": 1.0, "trained_tokens": 5, "parameters": 7, "device": "CPU"}
# before a step, after one, while a checkpoint is copied, before its parts are written, before it is sealed
POINTS = {"should_stop": (1, 3), "metric": (1, 2, 5), "position": (1, 3), "check_fence": (1, 2, 4, 5)}
MOST_SECONDS = 1.0


def case(folder: Path) -> dict[str, object]:
    output = f"{folder}.safetensors"
    return {"what": "training", "steps": STEPS, "every": 1, "folder": str(folder), "output": output}


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("call", POINTS)
@pytest.mark.parametrize("victim", [0, 1, "worker"])
def test_a_death_at_any_point_ends_all_and_costs_no_bit(
    on_ranks, tmp_path: Path, call: str, victim: int | str, record_property
) -> None:
    folders, most = {}, 0.0
    for nth in POINTS[call]:
        folder = folders[call, nth] = tmp_path / f"{call}-{nth}"
        facts = tmp_path / f"{call}-{nth}.json"
        given = {"victim": victim, "call": call, "nth": nth, "folder": str(tmp_path)}
        facts.write_text(json.dumps({**given, "case": case(folder), "summary": SUMMARY}))
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", str(WORKER), str(facts)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
            pids = json.loads(worker.stdout.readline())
            if victim == "worker":
                worker.wait()  # its ranks have its stdout, which ends with the last of them
                died = time.monotonic()
                while any(map(lives, pids)) and time.monotonic() < died + MOST_SECONDS:
                    time.sleep(0.005)
                most = max(most, time.monotonic() - died)
                assert [pid for pid in pids if lives(pid)] == []
            said = worker.stdout.readline()
        if victim == "worker":
            assert said == ""
        else:
            ended = json.loads(said)
            assert ended["code"] == "rank_lost"
            assert f"Rank {victim} of 2" in ended["message"]
            assert "SIGKILL" in ended["message"]
            assert ended["seconds"] <= MOST_SECONDS
            most = max(most, ended["seconds"])
            assert ended["left"] == []
        assert [pid for pid in pids if lives(pid)] == []
    record_property("points", len(POINTS[call]))
    record_property("most_seconds_until_all_had_ended", most)
    whole = tmp_path / "whole"
    answers = on_ranks(2, case(whole), *(case(folder) for folder in folders.values()))[0]
    expected = load_file(f"{whole}.safetensors")
    assert any(answer["resumed"] for answer in answers[1:])
    for point, folder in folders.items():
        found = load_file(f"{folder}.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected), point


@pytest.mark.parametrize("victim", [0, 1])
def test_a_suspended_rank_is_named_after_the_groups_timeout(tmp_path: Path, victim: int) -> None:
    facts = tmp_path / "facts.json"
    given = {"victim": victim, "call": "metric", "nth": 2, "signal": "SIGSTOP", "group_seconds": 5.0}
    given |= {"folder": str(tmp_path), "case": case(tmp_path / "training"), "summary": SUMMARY}
    facts.write_text(json.dumps(given))
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(WORKER), str(facts)]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    ended = json.loads(said.splitlines()[-1])
    assert (ended["code"], ended["left"]) == ("rank_lost", [])
    assert f"Rank {victim} of 2" in ended["message"]
    assert "did not answer the others within 5 s: its process is suspended" in ended["message"]
