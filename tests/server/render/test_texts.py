"""The texts hold what a model needs to go on, and stay short."""

import pytest

from opd_mcp.schemas.plans import PhaseEstimate
from opd_mcp.schemas.resolve import recipe_keys
from opd_mcp.schemas.runs import Failure, RunStatus
from opd_mcp.schemas.texts import byte_size, duration
from opd_mcp.server.render.plans import plan_text
from opd_mcp.server.render.recipe_keys import recipe_keys_text
from opd_mcp.server.render.runs import status_text, unchanged_text
from opd_mcp.server.render.workspace import setup_text


def test_a_plan_names_its_id_phases_costs_and_warnings(service):
    text = plan_text(service.plan(None))
    for part in ["plan-1", "sft (done: model-1) → distill", "lightning: 60 s", "live: 60 s", "[few_prompts]", "next: "]:
        assert part in text


def test_a_plan_lists_the_settings_that_overrides_may_change(service):
    """Only the sections that its phases use, each key with its value."""
    text = plan_text(service.plan(None))
    assert "distill.: method=lightning, estimator=sampled, topk=8" in text
    assert "optimizer.learning_rate=0.003" in text
    assert "opd://recipe-keys" in text
    assert "rollout.:" not in text


def test_the_recipe_keys_are_explained_with_their_values_in_every_preset():
    lines = recipe_keys_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[6:]] == list(recipe_keys())
    assert "| distill.steps | 50 | 150 | 400 | integer > 0 | of the optimizer |" in lines
    assert any(line.startswith("| distill.advantage_clip | 10.0 | 10.0 | 1.0 | number > 0 | τ;") for line in lines)


def test_an_estimate_says_how_much_of_it_is_the_start_of_the_process(service):
    plan = service.plan(None)
    start = PhaseEstimate(phase="process_start", flops=0, seconds=8, basis="assumed: 8 s to start Python")
    mine = plan.estimates[0].model_copy(update={"phases": [start]})
    text = plan_text(plan.model_copy(update={"estimates": [mine]}))
    assert "lightning: 60 s (of it 8 s process start, assumed)," in text


def test_a_status_gives_one_advice_on_when_to_look_again(service):
    """`next_check_s` is for programs that poll without waiting; next to wait_seconds=25 it would contradict."""
    assert service.run.next_check_s is not None
    for text in (status_text(service.run), unchanged_text(service.run)):
        assert "next check" not in text
    assert "wait_seconds=25" in status_text(service.run)


def test_the_setup_gives_the_paths_of_the_example(service):
    text = setup_text(service.setup())
    assert "/opt/examples/arithmetic/teacher_other_style" in text
    assert "no active runs" in text


def test_a_failed_run_shows_code_cause_fix_override_and_log(service):
    failure = Failure(
        code="not_enough_memory",
        cause="The batch does not fit.",
        fix="Use a smaller batch.",
        override={"distill.micro_batch_tokens": 4096},
        log_tail=[f"line {number}" for number in range(40)],
    )
    text = status_text(RunStatus(**{**service.run.model_dump(), "state": "failed", "error": failure}))
    assert "error [not_enough_memory] The batch does not fit." in text
    assert '{"distill.micro_batch_tokens":4096}' in text
    assert "line 39" in text
    assert "line 24" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14159, "3.14 s"), (600, "10 min"), (7200, "2 h"), (float("nan"), "over a year")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_sizes_are_readable():
    assert [byte_size(5), byte_size(1536), byte_size(3 << 30)] == ["5 B", "1.5 KiB", "3 GiB"]
