"""Each bad input gets one clear error with the way out, over a real connection, and nothing is started."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


def broken_inputs(world) -> dict[str, Any]:
    """Files and directories with one fault each."""
    data = world.data
    (data / "empty.jsonl").write_text("")
    (data / "malformed.jsonl").write_text('{"prompt": \n{"prompt": 3}\n')
    (data / "fieldless.jsonl").write_text('{"body": "1+1=?"}\n')
    (world.root / "outside.jsonl").write_text('{"prompt": "1+1=?"}\n')
    (data / "link.jsonl").symlink_to(world.root / "outside.jsonl")
    weightless = data / "weightless"
    shutil.copytree(EXAMPLES / "student", weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    pickled = data / "pickled"
    shutil.copytree(weightless, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    os.mkfifo(data / "pipe.jsonl")
    (data / "loop.jsonl").symlink_to(data / "loop.jsonl")
    adapted = data / "adapted"
    shutil.copytree(EXAMPLES / "student", adapted)
    (adapted / "adapter_config.json").write_text("{}")
    other_tokens = data / "other-tokens"
    shutil.copytree(EXAMPLES / "student", other_tokens)
    tokenizer = json.loads((other_tokens / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["@"] = vocabulary.pop("7")
    (other_tokens / "tokenizer.json").write_text(json.dumps(tokenizer))


def bad_plans(world) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """By the fault: the arguments of `plan_distillation` and what the error must say."""
    data = world.data
    faults: dict[str, tuple[str, Any, list[str]]] = {
        "unknown argument": ("promts", "x", ["[unknown_argument]", "Nearest: prompts"]),
        "unknown override": ("overrides", {"distill.step": 3}, ["[unknown_override]", "distill.steps"]),
        "relative path": ("student", "./student", ["[relative_path]", str(data)]),
        "relative data": ("prompts", "prompts.jsonl", ["[relative_path]", "absolute path"]),
        "outside the roots": ("prompts", world.root / "outside.jsonl", ["[outside_roots]", str(data)]),
        "link out of the roots": ("prompts", data / "link.jsonl", ["[outside_roots]"]),
        "a pipe": ("prompts", data / "pipe.jsonl", ["[special_file]"]),
        "a loop of links": ("prompts", data / "loop.jsonl", ["Fix"]),
        "a device": ("prompts", "/dev/zero", ["[outside_roots]"]),
        "by way of /proc": ("prompts", f"/proc/self/root{world.root}/outside.jsonl", ["[outside_roots]"]),
        "an open file": ("prompts", "/dev/fd/0", ["[outside_roots]"]),
        "a share": ("prompts", "//host/share/x.jsonl", ["[outside_roots]"]),
        "a name with NUL": ("prompts", f"{data}/x\0.jsonl", ["[not_found]"]),
        "up and out": ("prompts", f"{data}/../outside.jsonl", ["[outside_roots]"]),
        "a Hub id that climbs": ("student", "a/..", ["[relative_path]"]),
        "an adapter": ("student", data / "adapted", ["[not_a_model]", "LoRA"]),
        "missing file": ("prompts", data / "promts.jsonl", ["[not_found]", "prompts.jsonl"]),
        "empty data": ("prompts", data / "empty.jsonl", ["[empty_data]"]),
        "malformed line": (
            "prompts",
            data / "malformed.jsonl",
            ["[malformed_line]", "malformed.jsonl line 1", "2 rows"],
        ),
        "missing field": (
            "prompts",
            data / "fieldless.jsonl",
            ["[missing_field]", "fieldless.jsonl", 'columns={"prompt": "body"}'],
        ),
        "no weights": ("student", data / "weightless", ["[not_a_model]", "safetensors"]),
        "pickled weights": ("student", data / "pickled", ["[unsafe_weights]", "pytorch_model.bin"]),
        "other tokens": ("student", data / "other-tokens", ["[tokenizer_mismatch]", "'7'", "'@'"]),
        "too many inline prompts": ("prompts", ["1+1=?"] * 201, ["[invalid_argument]", "200"]),
        "no inline prompts": ("prompts", [], ["[empty_data]"]),
    }
    return {
        fault: (world.plan_arguments(**{name: str(value) if isinstance(value, Path) else value}), expected)
        for fault, (name, value, expected) in faults.items()
    }


def bad_calls(world) -> dict[str, tuple[str, dict[str, Any], list[str]]]:
    """By the fault: tool, arguments and what the error must say."""
    student, teacher, prompts = (world.plan_arguments()[name] for name in ("student", "teacher", "prompts"))
    unmade = {"teacher": teacher, "student": "model-nothing", "prompts": prompts}
    calls: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "unknown run": ("get_run_status", {"run_id": "no-such-run"}, ["[unknown_run]", "no-such-run"]),
        "unknown run to cancel": ("cancel_run", {"run_id": "no-such-run"}, ["[unknown_run]"]),
        "wait too long": ("get_run_status", {"wait_seconds": 26}, ["[wait_too_long]", "25"]),
        "unknown plan": ("start_distillation", {"plan_id": "plan-0123456789ab"}, ["[unknown_plan]"]),
        "start with too little": ("start_distillation", {"student": student}, ["[invalid_argument]"]),
        "no lineage": (
            "build_teacher_cache",
            unmade | {"student": student, "preset": "demo"},
            ["[lineage_missing]", "declared_teacher"],
        ),
        "a server elsewhere": (
            "build_teacher_cache",
            unmade | {"teacher": "t", "teacher_url": "http://169.254.169.254"},
            ["[teacher_host_not_allowed]", "--allow-teacher-host 169.254.169.254"],
        ),
        "unknown artifact": ("build_teacher_cache", unmade, ["[unknown_artifact]", "model-nothing"]),
    }
    for fault, (arguments, expected) in bad_plans(world).items():
        calls[fault] = ("plan_distillation", arguments, expected)
        calls[f"start with {fault}"] = ("start_distillation", arguments, expected)
    return calls


async def test_every_bad_input_is_one_clear_error_and_starts_nothing(world, connect, answer, subtests):
    broken_inputs(world)
    async with connect() as client:
        for fault, (tool, arguments, expected) in bad_calls(world).items():
            with subtests.test(fault):
                result = await client.call_tool(tool, arguments)
                assert result.is_error
                assert len(result.content) == 1
                text = result.content[0].text
                assert all(part in text for part in [*expected, "Fix: "]), text
                assert len(text) < 1500
                assert "Traceback" not in text
        runs = await answer(client, "list_runs")
    assert runs["total"] == 0
    assert not list((world.workspace / "runs").iterdir())


async def test_a_plan_that_no_longer_matches_is_refused(world, connect, answer):
    async with connect() as client:
        plan = await answer(client, "plan_distillation", **world.plan_arguments())
        assert not plan.get("blocking")
        with (world.data / "prompts.jsonl").open("a") as file:
            file.write('{"prompt": "1+1=?"}\n')
        result = await client.call_tool("start_distillation", {"plan_id": plan["plan_id"]})
        assert result.is_error
        assert "[plan_changed]" in result.content[0].text
        assert (await answer(client, "list_runs"))["total"] == 0
