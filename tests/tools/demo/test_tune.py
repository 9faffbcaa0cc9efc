"""The tool that chooses the demo's settings: what it prints, its rule, and that it never sees the final set."""

import subprocess
import sys
from pathlib import Path

from tools.demo import tune

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "demo" / "tune.py"
FEW = {"responses.limit": 16, "sft.steps": 2, "rollout.count": 32, "distill.steps": 2, "benchmark.limit": 8}
# Python's own audit of every file that the process opens; its children are told by the same variable.
WATCHED = """
import os, sys
def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".jsonl"):
        with os.fdopen(os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
            file.write(os.path.basename(str(arguments[0])) + "\\n")
sys.addaudithook(note)
"""


def test_settings_are_compared_on_the_tuning_prompts_and_the_final_set_is_never_opened(tmp_path: Path) -> None:
    """Both lightning arms and two initialisations, every .jsonl file that any of the processes opens noted."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCHED, encoding="utf-8")
    opened = tmp_path / "opened"
    few = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]

    def printed(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPT), "--work", str(tmp_path / "work"), "--jobs", "1"]
        environment = {"PYTHONPATH": str(tmp_path / "site"), "OPENED": str(opened), "HOME": str(tmp_path)}
        done = subprocess.run(
            [*command, *arguments, *few], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = printed("--seeds", "7").splitlines()
    assert [row.split(" | ")[0] for row in table[4:]] == ["| sft", "| lightning_sampled", "| lightning_topk"]
    assert table[2].endswith("| seed 7 | least | mean | training, s |")
    assert "initialisation" in printed("--initialisations", "1", "2", "--seeds", "7")
    assert set(opened.read_text(encoding="utf-8").split()) == {"sft.jsonl", "opd.jsonl", "tune.jsonl"}


def test_the_rule_takes_the_mean_nearest_to_the_middle_of_those_always_inside() -> None:
    accuracies = {"0": (0.45, 0.50), "1": (0.20, 0.65), "2": (0.30, 0.34), "3": (0.40, 0.43)}
    rows = {name: [tune.Outcome(value, 1.0) for value in row] for name, row in accuracies.items()}
    assert tune.chosen_initialisation(rows) == "3"
    assert tune.chosen_initialisation({name: rows[name] for name in ("0", "1", "2")}) == "0"
    assert tune.chosen_initialisation({"1": rows["1"]}) is None


def test_the_arms_are_those_of_the_demo() -> None:
    from opd_mcp.demo import ARMS, TOPK_STEPS

    assert set(tune.ARMS) <= set(ARMS["arithmetic"])
    assert tune.ARMS["lightning_topk"].items() >= TOPK_STEPS.items()
