"""Several ranks form the gradient that one process forms."""

from itertools import product
from typing import get_args

import pytest

from opd_mcp.schemas.recipes import Estimator

EXACT = 1e-12
CASES = list(product([True, False], ["sample", "token"], [10_000, 1], ["sft", "sampled", "topk"]))
# `odd`: no multiple of the ranks; `one`: a single row with a response, so that other ranks have none
WAYS = {
    "even": {"data": "even", "cases": CASES[::5]},
    "odd": {"data": "odd", "cases": CASES},
    "one": {"data": "one", "cases": CASES[::4]},
    "selective": {"data": "odd", "policy": "selective", "cases": CASES[:2]},
    "full": {"data": "odd", "policy": "full", "cases": CASES[:2]},
    "adapter": {"data": "odd", "adapter": True, "cases": CASES[::3]},
    "reweighed": {"data": "odd", "reweigh": True, "cases": CASES[1::6]},
}
# the vocabulary divided in the step as well, in tiles of some rows of it
ALL = [(place % 2 == 0, "sample", 10_000, f"of {name}") for place, name in enumerate(get_args(Estimator))]
DIVIDED = {
    "odd": {"data": "odd", "cases": CASES[::5]},
    "one": {"data": "one", "cases": CASES[::7]},
    "every_estimator": {"data": "odd", "cases": ALL, "tile_bytes": 4096},
    "a_row_at_a_time": {"data": "even", "cases": CASES[2:4], "tile_bytes": 1},
    "capped_with_bias": {"data": "odd", "capped": 3, "cases": [*CASES[12:14], *ALL[1:4:2]], "tile_bytes": 4096},
    "full": {"data": "odd", "policy": "full", "cases": CASES[:2]},
    "adapter": {"data": "odd", "adapter": True, "cases": CASES[::5]},
    "reweighed": {"data": "odd", "reweigh": True, "cases": CASES[1::7], "tile_bytes": 4096},
}
NARROW = {"what": "gradients", "data": "odd", "cases": CASES[:3], "dtype": "bfloat16"}
MEAN = {"what": "gradients", "data": "even", "cases": CASES[:3], "break": "mean"}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradient_is_that_of_one_process(on_ranks, size: int, record_property) -> None:
    cases = [{"what": "gradients", **way} for way in WAYS.values()]
    for answers in on_ranks(size, *cases, NARROW, MEAN):
        *exact, narrow, mean = answers
        assert [len(answer) for answer in exact] == [len(way["cases"]) for way in WAYS.values()]
        worst = {name: max(answer.values()) for name, answer in zip(WAYS, exact, strict=True)}
        record_property("worst_relative_difference", max(worst.values()))
        record_property("worst_in_bf16", max(narrow.values()))
        assert {name: value for name, value in worst.items() if value > EXACT} == {}
        # float32 weights under bf16 arithmetic: the weights are rounded alike, sums are in another order
        assert max(narrow.values()) <= 2e-2
        if size > 1:
            assert min(mean.values()) > 0.1  # a mean where a sum belongs is noticed


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_vocabulary_that_is_never_gathered_gives_the_same_gradient(on_ranks, size: int, record_property) -> None:
    cases = [{"what": "gradients", "divided": True, **way} for way in DIVIDED.values()]
    for answers in on_ranks(size, *cases, {**NARROW, "divided": True}):
        *exact, narrow = answers
        worst = {name: max(answer.values()) for name, answer in zip(DIVIDED, exact, strict=True)}
        record_property("worst_relative_difference", max(worst.values()))
        record_property("worst_in_bf16", max(narrow.values()))
        assert {name: value for name, value in worst.items() if value > EXACT} == {}
        assert max(narrow.values()) <= 2e-2
