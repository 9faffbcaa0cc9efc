"""A live distillation whose rollouts an engine draws: by copies of the student's weights, renewed every few steps."""

import importlib.util
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_mcp.engine import stages
from opd_mcp.engine.context import DistillInputs, EngineAddress, SilentReporter
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.schemas.errors import RunError
from opd_mcp.worker.held_engine import HeldEngine

STAND_IN = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"
STEPS, EVERY = 4, 2


class Steps(SilentReporter):
    """The metrics of every step; asks to stop after so many."""

    def __init__(self, most: int = STEPS) -> None:
        self.most, self.seen, self.told = most, {}, []

    def alert(self, code, message):
        self.told.append((code, message))

    def metric(self, step, values):
        self.seen[step] = values

    def should_stop(self):
        return len(self.seen) >= self.most


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("stand_in_engine", STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def live(build, module):
    """`live(name)`: four steps of live distillation on the stand-in; `live.wishes` are the engines started."""
    wishes, folder = [], build.root / "copies"

    @contextmanager
    def start_engine(wish):
        wishes.append(wish)
        copy = load_file(wish.model / "model.safetensors")
        wishes[-1] = replace(wish, model=copy)
        wire = module.Wire(wish.model.name, module.model_answers(made.serves or wish.model)).serve_in_background()

        def reload(path: Path) -> bool:
            wire.answer = module.model_answers(path) if made.takes else wire.answer
            return True

        try:
            yield [EngineAddress(wire.url, None, wish.dtype, managed=True, name=wish.model.name, reload=reload)]
        finally:
            wire.close()

    def made(name: str, reporter: Steps, **changes) -> Path:
        section = build.recipe.distill.model_copy(update={"method": "live", "steps": STEPS})
        rollout = build.recipe.rollout.model_copy(update={"engine": "vllm", "reload_steps": EVERY})
        inputs = DistillInputs(student=build.student, teacher=build.teacher, prompts=build.prompts, rollout=rollout)
        start = HeldEngine(start_engine).serving if made.in_place else start_engine
        context = replace(build.context(reporter=reporter, **changes), start_engine=start)
        stages.distill(section, inputs, build.root / name, context)
        return build.root / name

    made.wishes, made.folder, made.serves, made.in_place, made.takes = wishes, folder, None, False, True
    return made


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


def test_the_engine_is_given_the_student_every_few_steps_and_the_drift_between_is_measured(live, build):
    reporter = Steps()
    student = live("whole", reporter)
    assert [wish.beside_training for wish in live.wishes] == [True, True]
    first, second = (wish.model for wish in live.wishes)
    assert not differ(first, load_file(build.student / "model.safetensors"))
    assert differ(first, second)
    shares = [reporter.seen[step + 1]["effective_sample_share"] for step in range(STEPS)]
    assert shares[0] > 0.99999
    assert shares[2] > 0.99999, "rollouts of the student as it was at this step"
    assert shares[1] < shares[0]
    assert shares[3] < shares[2], "rollouts of the student as it was a step before"
    assert read_lineage(student).engines["rollout"].label() == "vllm 0.32.0 float32"


def test_weights_given_in_place_lead_to_the_student_that_restarts_lead_to(live):
    started = live("started", Steps())
    live.in_place = True
    given = live("given", Steps())
    assert len(live.wishes) == 3, "one more start, not two"
    assert not differ(*(load_file(path / "model.safetensors") for path in (started, given)))


def test_an_engine_that_takes_the_weights_by_word_only_is_started_again(live):
    """Two small steps are far less than rounding in bf16 explains."""
    started = live("started", Steps())
    live.in_place, live.takes = True, False
    reporter = Steps()
    given = live("given", reporter)
    assert len(live.wishes) == 4
    assert [code for code, _ in reporter.told] == ["engine_restarted"]
    assert not differ(*(load_file(path / "model.safetensors") for path in (started, given)))


def test_one_that_was_stopped_between_two_starts_draws_what_it_would_have_drawn(live, build):
    whole = live("whole", Steps())
    with pytest.raises(RunError, match="run_cancelled"):
        live("stopped", Steps(3), checkpoints=live.folder)
    assert [path.name for path in sorted(live.folder.iterdir())] == ["served-00000002", "step-00000003"]
    again = live("stopped", Steps(), checkpoints=live.folder)
    assert len(live.wishes) == 5
    assert not differ(live.wishes[3].model, live.wishes[4].model), "the copy, not the student as it is"
    assert not differ(*(load_file(path / "model.safetensors") for path in (whole, again)))


def test_an_engine_that_does_not_compute_the_student_is_found(live, build):
    live.serves = build.teacher
    with pytest.raises(RunError, match="engine_disagrees"):
        live("other", Steps())
