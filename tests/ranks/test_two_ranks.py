"""Two ranks in short; `make test-ranks` does the rest: three ranks, every kind of step, and deaths at every point."""

from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = [[True, "sample", 40, "sampled"], [False, "token", 1, "sft"]]


def test_two_ranks_form_one_processes_gradient_and_continue_to_the_bit(on_ranks, tmp_path: Path) -> None:
    common = {"what": "training", "steps": 4}
    training = {name: {"folder": str(tmp_path / name), "output": str(tmp_path / f"{name}.st")} for name in "abcd"}
    divided = {**common, "vocabulary": "divided"}
    first, second = on_ranks(
        2,
        {"what": "gradients", "data": "odd", "cases": STEPS},
        {"what": "gradients", "data": "odd", "cases": STEPS, "break": "mean"},
        {**common, **training["a"]},
        {**common, **training["b"], "stop": 3},
        {**common, **training["b"]},
        {"what": "gradients", "data": "odd", "cases": STEPS, "divided": True, "tile_bytes": 4096},
        {**divided, **training["c"]},
        {**divided, **training["d"], "stop": 2},
        {**divided, **training["d"]},
    )
    assert max(first[0].values()) <= 1e-12
    assert min(first[1].values()) > 0.1
    assert (first[3]["stopped"], first[4]["resumed"], second[4]["resumed"]) == ("run_cancelled", 3, 3)
    assert max(first[5].values()) <= 1e-12
    assert [answer["vocabulary"] for answer in first[2:5:2] + first[6:9:2]] == ["gathered"] * 2 + ["divided"] * 2
    whole = {name: load_file(tmp_path / f"{name}.st") for name in "abcd"}
    for one, other in ("ab", "cd"):
        assert all(torch.equal(whole[one][name], whole[other][name]) for name in whole[one])
    # another way to add up the same numbers
    assert all(torch.allclose(whole["a"][name], whole["c"][name], rtol=1e-3, atol=1e-4) for name in whole["a"])
