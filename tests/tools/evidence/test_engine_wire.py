"""What an engine answers against transformers, measured on the stand-in, whose answers are this program's own."""

import json
import sys
from pathlib import Path

import numpy as np

from tools.evidence import engine_wire

STAND_IN = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"


def test_an_engine_that_computes_the_model_is_near_and_follows_new_weights(tmp_path, monkeypatch, capsys):
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\nsys.argv[0] = {str(STAND_IN)!r}\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv])\n"
    )
    program.chmod(0o755)
    for name, value in {"ROWS": 4, "GREEDY": 2, "AGAIN": 2, "VOCAB": 22}.items():  # ids that mean something
        monkeypatch.setattr(engine_wire, name, value)
    given = engine_wire.parser().parse_args(["--kind", "vllm", "--program", str(program)])
    assert engine_wire.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(found[name]["largest"] for name in ("drawn", "given", "given_after")) <= engine_wire.BAR
    assert found["before"]["mean"] > 0.01, "the second model is another one"
    assert (found["same_seed_same_row"], found["took_weights"], found["left_over"]) == ("2 of 2", True, 0)
    assert found["other_greedy"].startswith("0 of ")
    assert set(found["killed"]) == {"server"}, "the stand-in's core has no title"
    assert found["killed"]["server"]["given"]["largest"] <= engine_wire.BAR


def test_a_distance_is_over_all_tokens():
    found = engine_wire.distance([[1.0, 2.0], [3.0]], [np.array([1.0, 2.5]), np.array([2.0])])
    assert found == {"tokens": 3, "mean": 0.5, "largest": 1.0}
