"""What a phase hands to its stage, where the recipe decides it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_mcp.engine.context import Context
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import RunInputs, RunRecord, RunRequest
from opd_mcp.worker.stage_calls import StageCalls


class Called(Exception):
    """Carries the inputs that a stage was called with."""


def inputs_of(phase: str, tmp_path: Path, *, made: tuple[str, ...] = (), **overrides: object):
    def called(section, inputs, output, context):
        raise Called(inputs)

    names = {name.replace("__", "."): value for name, value in overrides.items()}
    request = RunRequest(kind="distill", recipe=resolve_recipe("demo", names), inputs=RunInputs(), phases=[])
    record = RunRecord(
        run_id="run-1", created_at="2026-11-28T00:00:00Z", request_hash="0", request=request, versions={}, hardware=""
    )
    stages = SimpleNamespace(rollout=called, score=called, benchmark=called)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=?"}\n')
    paths = {name: tmp_path / name for name in ("student", "base", "rollouts", "teacher", *made)} | {"prompts": prompts}
    calls = StageCalls(record, tmp_path, Context(), lambda: stages, paths)
    with pytest.raises(Called) as raised:
        calls.compute(phase, tmp_path / "output")
    return raised.value.args[0]


def test_rollouts_and_their_scores_are_of_the_form_that_is_distilled(tmp_path):
    nf4 = {"distill__adapter": {"quantization": "nf4"}}
    for phase in ("rollout", "score"):
        assert inputs_of(phase, tmp_path).form == "as_saved"
        assert inputs_of(phase, tmp_path, sft__adapter={"quantization": "nf4"}).form == "as_saved"
        assert inputs_of(phase, tmp_path, **nf4).form == "nf4"


def test_the_report_is_told_in_which_form_the_last_training_held_its_student(tmp_path):
    nf4 = {"quantization": "nf4"}
    assert inputs_of("benchmark", tmp_path, made=("model",), distill__adapter=nf4).forms == {"sft": "nf4"}
    assert inputs_of("benchmark", tmp_path, made=("model",)).forms == {"sft": "as_saved"}
    assert inputs_of("benchmark", tmp_path, sft__adapter=nf4).forms == {"base": "nf4"}
