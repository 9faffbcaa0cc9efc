"""Every row in exactly one micro-batch, and few of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd_mcp.engine.data.batches import bucketed_groups, grouped_rows, packed_groups

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths=LENGTHS, most=st.integers(1, 200))
def test_packs_hold_every_row_once_within_the_most(lengths: list[int], most: int) -> None:
    sizes, rows = np.asarray(lengths), np.arange(len(lengths))
    groups = packed_groups(sizes, rows, most)
    assert sorted(np.concatenate(groups).tolist()) == rows.tolist()
    assert all(sizes[group].sum() <= most or len(group) == 1 for group in groups)


@given(lengths=LENGTHS, most=st.integers(60, 200))
def test_at_most_one_pack_is_half_empty(lengths: list[int], most: int) -> None:
    groups = packed_groups(np.asarray(lengths), np.arange(len(lengths)), most)
    least = -(-sum(lengths) // most)
    assert len(groups) <= least * 2, "no two half-empty packs can remain"
    assert sum(sum(np.asarray(lengths)[g]) <= most / 2 for g in groups) <= 1


@given(lengths=LENGTHS, most=st.integers(1, 200))
def test_buckets_hold_every_row_once_and_their_padded_size_fits(lengths: list[int], most: int) -> None:
    sizes, rows = np.asarray(lengths), np.arange(len(lengths))
    groups = bucketed_groups(sizes, rows, most)
    assert sorted(np.concatenate(groups).tolist()) == rows.tolist()
    assert all(sizes[group].max() * len(group) <= most or len(group) == 1 for group in groups)


def test_realistic_lengths_fill_nine_tenths_of_the_packs() -> None:
    lengths = np.random.default_rng(0).lognormal(6.5, 0.8, size=400).clip(200, 4096).astype(np.int64)
    groups = packed_groups(lengths, np.arange(400), 16384)
    assert lengths.sum() / (len(groups) * 16384) > 0.9


def test_only_the_chosen_rows_are_grouped() -> None:
    chosen = grouped_rows(np.asarray([3, 9, 4, 8]), np.asarray([1, 3]), 100, packed=True)
    assert [group.tolist() for group in chosen] == [[1, 3]]
