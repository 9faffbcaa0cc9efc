"""How a packed row is cut into documents that are computed together."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.models import attention
from opd_mcp.engine.models.attention import Documents, attention_groups

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_runs_are_long_documents_alone_and_the_short_ones_between_them(lengths: list[int]) -> None:
    runs = Documents(lengths, CPU).runs
    assert [length for _, _, part in runs for length in part.lengths] == lengths
    assert [0, *(stop for _, stop, _ in runs)] == [*(start for start, _, _ in runs), sum(lengths)]
    for start, stop, part in runs:
        assert stop - start == sum(part.lengths)
        assert len(part.lengths) == 1 or max(part.lengths) < attention.LONG_DOCUMENT
    short = [max(part.lengths) < attention.LONG_DOCUMENT for _, _, part in runs]
    assert not any(a and b for a, b in pairwise(short)), "short neighbours share a call"


@pytest.mark.parametrize("lengths", [[40], [3, 5], [40, 3, 5, 33, 64, 2], [2, 40]])
@pytest.mark.parametrize("shared", [4, 2])
def test_long_documents_alone_give_what_all_in_one_call_give(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], shared: int
) -> None:
    """What CUDA does, with the CPU's attention in place of the variable-length kernel; widths are rounded up to 16."""
    monkeypatch.setattr(attention, "LONG_DOCUMENT", 32)
    monkeypatch.setattr(attention, "WIDTH_STEP", 16)
    monkeypatch.setattr(attention, "_variable_length", attention._by_document)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(heads, sum(lengths), 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, shared, shared)
    ]
    found = []
    for way in (attention._on_cuda, attention._by_document):
        output = way(*states, Documents(lengths, CPU), 0.3, None)
        found.append([output, *torch.autograd.grad(output.square().sum(), states)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), spare=st.integers(0, 5000))
def test_attention_groups_cover_the_documents_and_waste_little(lengths: list[int], spare: int) -> None:
    groups = attention_groups(lengths, spare)
    assert groups[0][0] == 0
    assert groups[-1][1] == len(lengths)
    assert all(left[1] == right[0] for left, right in pairwise(groups))
    for first, last in groups:
        work = sum(length * length for length in lengths[first:last])
        assert max(lengths[first:last]) ** 2 * (last - first) - work <= max(spare, work // 8)
