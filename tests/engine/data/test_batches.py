"""The order in which rows are admitted, and how much of each is trained on."""

import numpy as np

from opd_mcp.engine.data.batches import StepData, length_sorted_batches, shortened_steps
from opd_mcp.engine.data.sequences import build_sequences


def test_batches_hold_rows_of_like_length_the_longest_first() -> None:
    batches = length_sorted_batches([3, 9, 1, 9, 4, 2, 8], 3)
    assert [batch.tolist() for batch in batches] == [[1, 3, 6], [4, 0, 5], [2]]


def test_no_row_means_no_batch() -> None:
    assert length_sorted_batches([], 3) == []


def test_only_the_beginnings_of_responses_are_trained_on_and_their_columns_go_along() -> None:
    rows = build_sequences([[1], [2, 3]], [[4, 5, 6, 7], [8]], columns={"teacher_logprobs": np.arange(5.0)})

    def steps_from(first: int):
        return iter([StepData(rows, np.arange(2))] * (6 - first))

    fixed = next(shortened_steps(steps_from, 3, None)(0)).sequences
    assert [fixed.response(row).tolist() for row in range(2)] == [[4, 5, 6], [8]]
    assert fixed.columns["teacher_logprobs"].tolist() == [0, 1, 2, 4]
    share = next(shortened_steps(steps_from, 0.3, None)(0)).sequences
    assert share.response_lengths().tolist() == [2, 1]
    growing = [data.sequences.response_lengths().tolist() for data in shortened_steps(steps_from, 1, 4)(0)]
    assert growing == [[1, 1], [2, 1], [3, 1], [4, 1], [4, 1], [4, 1]]
    resumed = [data.sequences.response_lengths().tolist() for data in shortened_steps(steps_from, 1, 4)(2)]
    assert resumed == growing[2:], "the step's number decides, not how often it was asked"
