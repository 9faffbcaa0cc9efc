"""Several ranks form the gradient that one process forms."""

from itertools import product

import pytest

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
