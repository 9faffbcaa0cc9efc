"""The script for adapters on a GPU runs end to end on tiny shapes; its numbers mean nothing here."""

import json
import sys

import pytest

from tools.gpu import adapters


def test_the_script_measures_both_bases_and_all_parts_of_a_step(tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["adapters.py", "--device", "cpu", "--tiny", "--json", str(report)])
    monkeypatch.setattr(adapters, "ROUNDS", 1)
    with pytest.raises(SystemExit) as ended:
        adapters.main()
    assert ended.value.code == 0
    found = json.loads(report.read_text())
    rows = {name: row for name, row in found["adapters"].items() if isinstance(row, dict) and "peft" not in name}
    assert list(rows) == [
        f"{base}, {run}" for base in ("bf16", "nf4") for run in ("160, auto", "320, auto", "320, full")
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    packed, plain = (rows[f"{base}, 320, full"]["estimated_bytes"] for base in ("nf4", "bf16"))
    assert packed != plain
    tiny = found["shapes"]["tiny"]
    assert tiny["training"]["tokens"] in (160, 320)
    assert set(tiny["training"]["utilisation_by_tokens"]) == set(tiny["scoring"]["utilisation_by_tokens"])
    assert 0 < tiny["training"]["head_share_of_time"] < 2


def test_bars_are_missed_by_name(monkeypatch):
    monkeypatch.setattr(adapters, "failures", [])
    slow = {"utilisation": 0.1}
    table = {name: {"training": slow, "scoring": slow} for name in ("0.6B", "1.7B", "4B", "8B")}
    adapters.judge_shapes(table | {"8B": {"training": {"out_of_memory": True}, "scoring": {"out_of_memory": True}}})
    assert [line.split(":")[0] for line in adapters.failures] == [
        "0.6B training",
        "1.7B training",
        "4B training",
        "4B scoring",
        "8B scoring",
    ]
