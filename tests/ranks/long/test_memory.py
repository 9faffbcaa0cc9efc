"""What a rank holds while it trains: its part of weights, gradients and moments, and the vocabulary that it gathers."""

# 46.6 million weights, of which the untied vocabulary is 37.7 million
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "head_dim": 96,
    "intermediate_size": 576,
}


def test_a_rank_of_two_peaks_at_three_quarters_of_one_process(on_ranks, record_property) -> None:
    case = {"what": "memory", "sizes": SIZES}
    alone = on_ranks(1, {**case, "alone": True})[0][0]
    share = max(rank[0] for rank in on_ranks(2, case)) / alone
    record_property("bytes_of_one_process", alone)
    record_property("share_of_a_rank", share)
    assert share <= 0.75
