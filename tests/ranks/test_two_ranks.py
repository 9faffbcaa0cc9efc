"""Two ranks in short; `make test-ranks` does the rest: three ranks, every kind of step, and deaths at every point."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def test_two_ranks_form_one_processes_gradient_and_continue_to_the_bit(on_ranks, tmp_path: Path) -> None:
    steps = [[True, "sample", 40, "sampled"], [False, "token", 1, "sft"]]
    common = {"what": "training", "steps": 4}
    training = {name: {"folder": str(tmp_path / name), "output": str(tmp_path / f"{name}.st")} for name in "ab"}
    first, second = on_ranks(
        2,
        {"what": "gradients", "data": "odd", "cases": steps},
        {"what": "gradients", "data": "odd", "cases": steps, "break": "mean"},
        {**common, **training["a"]},
        {**common, **training["b"], "stop": 3},
        {**common, **training["b"]},
    )
    assert max(first[0].values()) <= 1e-12
    assert min(first[1].values()) > 0.1
    assert (first[3]["stopped"], first[4]["resumed"], second[4]["resumed"]) == ("run_cancelled", 3, 3)
    one, other = load_file(tmp_path / "a.st"), load_file(tmp_path / "b.st")
    assert all(torch.equal(one[name], other[name]) for name in one)
