"""The texts hold what a model needs to go on, and stay short."""

import pytest

from opd_mcp.schemas.runs import Failure, RunStatus
from opd_mcp.server.texts import duration, plan_text, setup_text, size, status_text


def test_a_plan_names_its_id_phases_costs_and_warnings(service):
    text = plan_text(service.plan(None))
    for part in ["plan-1", "sft (done: model-1) → distill", "lightning: 60 s", "live: 60 s", "[few_prompts]", "next: "]:
        assert part in text


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
    assert [size(5), size(1536), size(3 << 30)] == ["5 B", "1.5 KiB", "3 GiB"]
