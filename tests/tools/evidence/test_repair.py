"""What a repair wins back, from accuracies per seed."""

import pytest

from tools.evidence.repair import recovered


def seed(consistent: float, mismatched: float, repaired: float) -> dict[str, dict[str, float]]:
    accuracies = {"consistent": consistent, "mismatched": mismatched, "repaired": repaired}
    return {name: {"accuracy": value} for name, value in accuracies.items()}


def test_the_share_won_back_and_its_intervals_are_over_seeds():
    found = recovered([seed(0.9, 0.5, 0.7), seed(0.8, 0.4, 0.6), seed(0.7, 0.1, 0.5)])
    assert found["share"] == pytest.approx((0.8 / 3) / (1.4 / 3))
    mean, low, high = found["lost"]
    assert mean == pytest.approx(1.4 / 3)
    assert (low + high) / 2 == pytest.approx(mean)
    assert high - mean == pytest.approx(4.30 * (0.1154700538 / 3**0.5), rel=1e-6)


def test_without_a_loss_there_is_no_share():
    assert recovered([seed(0.5, 0.5, 0.5), seed(0.6, 0.6, 0.7)])["share"] is None
