"""Mutated files end in an OpdError or are read."""

import importlib.util
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_readers.py"


def test_no_reader_raises_anything_but_an_opd_error():
    spec = importlib.util.spec_from_file_location("fuzz_readers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.fuzz(rounds=40, seed=7)
    assert found["crashes"] == {}
    assert found["cases"] >= 500
    assert len(found["errors"]) > 10
