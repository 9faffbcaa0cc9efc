"""The simulation: what it must give where it can be worked out by hand, and that the document quotes it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tools.bench.scale_simulation import Assumptions, measured, report, simulated, table

SCALE = Path(__file__).resolve().parents[3] / "docs" / "scale.md"


def test_without_losses_the_hours_are_the_work_over_the_speed():
    ideal = replace(Assumptions(), straggling=0.0, device_mtbf=1e30, phase_start=0.0, bandwidth_inside=1e30)
    ideal = replace(ideal, collective_latency=0.0)
    one, eight = simulated(ideal, 1), simulated(ideal, 8)
    tokens = ideal.rollouts * (ideal.prompt_tokens + ideal.response_tokens)
    assert one["score"].seconds == pytest.approx(tokens / ideal.scoring_tokens_per_second)
    assert one["distill"].seconds == pytest.approx(tokens / ideal.training_tokens_per_second)
    for name, phase in one.items():
        assert eight[name].seconds == pytest.approx(phase.seconds / 8)
        assert eight[name].limit == "none"


def test_more_devices_never_do_more_each_and_failures_cost_time():
    rows = report(Assumptions())["rows"]
    assert all(later["efficiency"] <= earlier["efficiency"] for earlier, later in pairwise(rows))
    often = simulated(replace(Assumptions(), device_mtbf=3600.0), 64)
    assert often["distill"].failures > 0
    assert often["distill"].seconds > simulated(replace(Assumptions(), device_mtbf=1e30), 64)["distill"].seconds


def test_between_machines_replicas_cost_a_gradient_per_step_and_no_weights():
    slow = replace(Assumptions(), straggling=0.0, device_mtbf=1e30, bandwidth_inside=1e30, bandwidth_between=1e9)
    slow = replace(slow, collective_latency=0.0)
    apart, together = (simulated(replace(slow, replicated=way), 16)["distill"].seconds for way in (True, False))
    free = simulated(replace(slow, bandwidth_between=1e30), 16)["distill"].seconds
    gradient = 8 * slow.student_parameters / 8 * (1 - 1 / 2) / 1e9
    assert apart - free == pytest.approx(slow.steps * gradient)
    assert together > apart
    one = replace(slow, replicated=False)
    assert simulated(one, 8)["distill"].seconds == simulated(slow, 8)["distill"].seconds


def test_the_document_quotes_it():
    assert table(report(measured(Assumptions()))) in SCALE.read_text()
