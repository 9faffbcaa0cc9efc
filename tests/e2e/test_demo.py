"""The demo on a few steps: every arm of each task, every tool it needs, the guard, and the file it writes."""

import json

import pytest

from opd_mcp.demo import ARMS, QUICK, run_demo


@pytest.mark.parametrize("task", ARMS)
def test_the_demo_runs_every_arm_and_its_guard_refuses(task, tmp_path, monkeypatch, capsys):
    arms = ARMS[task]
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    file = tmp_path / "demo.json"
    run_demo(7, file, tmp_path / "home", task=task, overrides=QUICK)

    written = json.loads(file.read_text(encoding="utf-8"))
    assert written.keys() - {"consistency_guard"} == {"task", "arms", "wall_seconds", "seed"}
    assert list(written["arms"]) == list(arms)
    assert (written["task"], written["seed"]) == (task, 7)
    trained = {name for name, arm in written["arms"].items() if arm["steps"]}
    assert trained == set(arms) - {"base", "teacher"}
    for name, arm in written["arms"].items():
        low, high = arm["accuracy_ci"]
        assert low <= arm["accuracy"] <= high
        assert ("seconds_per_step" in arm) == (name in trained)
        assert arm["seconds_total"] >= arm["seconds"]
    assert written["arms"]["teacher"]["accuracy"] > 0.9
    assert ("consistency_guard" in written) == ("sft_other_style" in arms)
    if guard := written.get("consistency_guard"):
        assert guard["refused"]
        assert "teacher_other_style@" in guard["message"]
        assert " teacher@" in guard["message"]
    printed = capsys.readouterr().out
    assert all(name[:6] in printed for name in arms)
