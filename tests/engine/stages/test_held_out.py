"""A student judged while it trains: its best weights are kept, and training without gain ends early."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd_mcp.engine import stages
from opd_mcp.engine.context import DistillInputs
from opd_mcp.schemas.errors import ArgumentError, RunError
from opd_mcp.schemas.reports import TrainingSummary
from opd_mcp.schemas.resolve import resolve_recipe
from tests.engine.conftest import Builder

# so high a rate spoils the student: what it was after the first steps is the best
SPOILING = {"learning_rate": 0.3, "warmup_steps": 0, "schedule": "constant"}


def section_of(build: Builder, **changes: object):
    distill = build.recipe.distill
    judged = {"evaluate_steps": 1, "evaluate_prompts": 4, "keep": "best", "steps": 4}
    return distill.model_copy(update={"optimizer": distill.optimizer.model_copy(update=SPOILING), **judged, **changes})


@pytest.fixture
def distilled(build: Builder, finished: Path, example: Path):
    """`distilled(name, section, context)`: the folder of a student that was judged in its training."""

    def run(name: str, section, context=None) -> Path:
        inputs = DistillInputs(
            student=build.student,
            cache=finished,
            held_out=example / "eval.jsonl",
            grading=build.recipe.benchmark,
            judge=example / "teacher",
        )
        stages.distill(section, inputs, build.root / name, context or build.context())
        return build.root / name

    return run


def summary_of(folder: Path):
    return TrainingSummary.from_json((folder / "training.json").read_bytes())


def test_the_best_weights_are_saved_and_a_training_without_gain_ends(build: Builder, distilled) -> None:
    last = distilled("last", section_of(build, keep="last"))
    best = distilled("best", section_of(build))
    stopped = distilled("stopped", section_of(build, patience=2))
    told = [summary_of(folder).held_out for folder in (last, best, stopped)]
    values = [entry.reverse_kl for entry in told[0].evaluations]
    assert len(values) == 4
    assert values[-1] > min(values), "the rate is meant to spoil the student"
    least = values.index(min(values)) + 1
    assert [entry.reverse_kl for entry in told[1].evaluations] == values
    assert [(of.best_step, of.kept_step, of.last_step) for of in told[:2]] == [(least, 4, 4), (least, least, 4)]
    short = distilled("short", section_of(build, keep="last", steps=least))
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (best, short))
    assert all((mine[name] == theirs[name]).all() for name in mine)
    assert summary_of(stopped).steps == min(least + 2, 4)
    assert told[2].kept_step == least


def test_a_resumed_training_judges_and_keeps_as_it_would_have(build: Builder, distilled, stopping, tmp_path) -> None:
    whole = distilled("whole", section_of(build))
    kept = {"checkpoints": tmp_path / "checkpoints"}
    context = replace(build.context(), **kept, checkpoint=build.recipe.checkpoint.model_copy(update={"steps": 1}))
    with pytest.raises(RunError, match="run_cancelled"):
        distilled("again", section_of(build), replace(context, reporter=stopping(3)))
    history = json.loads((tmp_path / "checkpoints" / "held_out.json").read_text())["history"]
    assert 0 < len(history) < 4
    again = distilled("again", section_of(build), context)
    assert summary_of(again).held_out == summary_of(whole).held_out
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all((one[name] == other[name]).all() for name in one)


def test_what_cannot_be_judged_is_refused_by_its_recipe() -> None:
    for overrides, said in (
        ({"distill.keep": "best"}, "evaluate_steps"),
        ({"distill.patience": 2}, "evaluate_steps"),
        ({"distill.evaluate_steps": 2, "distill.keep": "best", "distill.rounds": 2}, "one round"),
    ):
        with pytest.raises(ArgumentError, match=said):
            resolve_recipe("demo", overrides)
