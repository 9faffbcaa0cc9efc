"""The order in which rows are admitted."""

from opd_mcp.engine.data.batches import length_sorted_batches


def test_batches_hold_rows_of_like_length_the_longest_first() -> None:
    batches = length_sorted_batches([3, 9, 1, 9, 4, 2, 8], 3)
    assert [batch.tolist() for batch in batches] == [[1, 3, 6], [4, 0, 5], [2]]


def test_no_row_means_no_batch() -> None:
    assert length_sorted_batches([], 3) == []
