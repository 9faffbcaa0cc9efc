"""Whatever goes wrong in a call is one readable error with a code and a fix, and the service is not called in vain."""

import logging

import pytest

from opd_mcp.schemas.errors import ConsistencyError

pytestmark = pytest.mark.anyio

PLAN = {"student": "/data/student", "teacher": "/data/teacher", "prompts": "/data/prompts.jsonl"}


async def error_text(connect, tool, arguments):
    async with connect() as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert len(result.content) == 1
    return result.content[0].text


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("plan_distillation", PLAN | {"studnet": "x"}, ["[unknown_argument]", "studnet", "Nearest: student"]),
        ("inspect_setup", {"verbose": True}, ["[unknown_argument]", "without arguments"]),
        ("plan_distillation", {"student": "/data/s"}, ["[invalid_argument]", "'teacher'", "absolute path"]),
        ("plan_distillation", PLAN | {"teacher": None}, ["[invalid_argument]", "needs the argument 'teacher'"]),
        ("plan_distillation", PLAN | {"method": "lightnin"}, ["[invalid_argument]", "Nearest: lightning", "one of"]),
        (
            "sample_model",
            {"model": "/m", "prompts": ["1+1=?"] * 9},
            ["[invalid_argument]", "at most 8 items", "Fix: Give prompts: a list of up to 8 texts."],
        ),
        (
            "get_run_metrics",
            {"run_ids": ["a", "b", "c", "d", "e"]},
            ["[invalid_argument]", "Fix: Give run_ids: a list of up to 4 texts: run ids, or 'latest'."],
        ),
        ("plan_distillation", PLAN | {"prompts": 3}, ["[invalid_argument]", "'prompts'", "'3'", "up to 200 inline"]),
        ("plan_distillation", PLAN | {"prompts": ["x"] * 201}, ["[invalid_argument]", "'prompts'", "200"]),
        ("build_teacher_cache", PLAN | {"topk": 1000}, ["[invalid_argument]", "'1000'", "from 0 to 256"]),
        ("list_runs", {"limit": 0}, ["[invalid_argument]", "'limit'", "from 1 to 100"]),
        ("get_run_status", {"wait_seconds": 25.5}, ["[wait_too_long]", "25.5", "wait_seconds=25"]),
        ("get_run_status", {"wait_seconds": -1}, ["[invalid_argument]", "'wait_seconds'", "from 0 to 25"]),
        (
            "get_run_status",
            {"run_id": "lightning-arithmetic-7f3b"},
            ["[unknown_run]", "Nearest: lightning-arithmetic-7f3a"],
        ),
    ],
)
async def test_bad_arguments_get_one_clear_error(connect, service, tool, arguments, expected):
    text = await error_text(connect, tool, arguments)
    for part in [*expected, "Fix: "]:
        assert part in text
    assert len(text) < 700
    assert all(name == "status" for name, _ in service.calls)


async def test_a_number_that_is_not_finite_is_refused(connect, service):
    text = await error_text(connect, "plan_distillation", PLAN | {"overrides": '{"distill.advantage_clip": NaN}'})
    assert "[invalid_argument]" in text
    assert "not finite" in text
    assert not service.calls


async def test_a_long_value_is_shown_short(connect):
    text = await error_text(connect, "list_runs", {"state": "x" * 10_000})
    assert "[invalid_argument]" in text
    assert len(text) < 700


async def test_an_expected_failure_reads_as_it_was_written(connect, service):
    service.fails = ConsistencyError(
        "teacher_mismatch", "Another teacher made the SFT responses.", value="a@1 and b@2", fix="Rebuild the cache."
    )
    text = await error_text(connect, "start_distillation", {"plan_id": "plan-1"})
    assert str(service.fails) in text


async def test_an_unexpected_failure_is_short_and_its_traceback_is_logged(connect, service, caplog):
    service.fails = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR):
        text = await error_text(connect, "start_sft", {"student": "/data/s", "responses": "/data/r"})
    assert "[internal_error] ZeroDivisionError" in text
    assert "secret detail" not in text
    assert any(record.exc_info for record in caplog.records)
