"""Remedies: a bad verdict's change of the recipe, by the deepest of its causes."""

import pytest

from opd_mcp.grading.remedies import changes_text, remedy
from opd_mcp.schemas.next_action import plan_call
from opd_mcp.schemas.reports import Verdict
from opd_mcp.schemas.resolve import far_rates, resolve_recipe

SMALL, LARGE = 108_000, 4_000_000_000
RATE = "distill.optimizer.learning_rate"


def verdict(judgement: str, *causes: str) -> Verdict:
    return Verdict(judgement=judgement, sentence="S.", causes=list(causes) or None, next_action=plan_call("Look."))


@pytest.mark.parametrize(
    ("causes", "changes"),
    [
        (["learning_rate_far"], {RATE: 3e-3}),
        (["collapse"], {RATE: 0.03}),
        (["learning_rate_far", "collapse"], {RATE: 3e-3}),
        (["no_learning"], {"distill.steps": 1600}),
        (["sft_undertrained", "no_learning"], {"sft.steps": 1000}),
        (["rollouts_stale"], {"distill.steps": 200}),
        (["step_skipped"], {RATE: 0.1}),
        (["answers_truncated"], {"benchmark.sampling.max_new_tokens": 128}),
        (["advantages_clipped"], {RATE: 0.1}),
        ([], {RATE: 3e-3}),
    ],
)
def test_the_deepest_cause_that_names_a_key_is_lifted(causes, changes):
    recipe = resolve_recipe("demo", {RATE: 0.3})
    assert remedy(verdict("worse", *causes), recipe, ["sft", "distill"], SMALL) == changes


def test_few_steps_at_a_small_student_s_rate_become_those_that_it_takes():
    recipe = resolve_recipe("quick", {RATE: 3e-3})
    changes = remedy(verdict("worse", "few_steps"), recipe, ["distill"], SMALL)
    assert (changes["distill.steps"], changes["distill.optimizer.schedule"]) == (400, "linear")
    text = changes_text(changes, recipe)
    assert "'distill.steps' from 50 to 400 and 'distill.optimizer.schedule' from constant to linear" in text


def test_without_a_cause_a_loss_lowers_the_rate_and_no_difference_doubles_the_steps():
    recipe = resolve_recipe("demo", {})
    assert remedy(verdict("worse"), recipe, ["distill"], SMALL) == {RATE: 1e-3}
    assert remedy(verdict("no_difference"), recipe, ["sft"], SMALL) == {"sft.steps": 500}


def test_a_collapse_never_raises_a_rate_though_it_is_low_for_the_size():
    recipe = resolve_recipe("demo", {RATE: 1e-4})
    assert remedy(verdict("worse", "collapse"), recipe, ["distill"], SMALL) == {RATE: 1e-5}


def test_a_tenth_of_what_fits_is_not_called_too_low():
    recipe = resolve_recipe("demo", {})
    lowered = remedy(verdict("worse", "collapse"), recipe, ["distill"], SMALL)
    assert far_rates(resolve_recipe("demo", lowered), ["distill"], SMALL) == []


def test_a_preset_whose_rates_do_not_fit_the_student_is_changed_in_every_stage_that_was_trained():
    recipe = resolve_recipe("demo", {})
    changes = remedy(verdict("worse", "preset_rates", "collapse"), recipe, ["sft", "distill"], LARGE)
    assert changes == {"sft.optimizer.learning_rate": 8e-5, RATE: 2e-6}


def test_a_gain_and_a_run_without_training_change_nothing():
    recipe = resolve_recipe("demo", {})
    assert remedy(verdict("better", "collapse"), recipe, ["distill"], SMALL) == {}
    assert remedy(verdict("worse", "collapse"), recipe, [], SMALL) == {}
    assert changes_text({}, recipe) == ""


def test_the_changes_are_told_with_what_they_were():
    recipe = resolve_recipe("quick", {})
    text = changes_text({"distill.steps": 200, RATE: 3e-3}, recipe)
    assert text == f"The call changes 'distill.steps' from 50 to 200 and '{RATE}' from 2e-06 to 0.003."
