"""The stages on two real ranks of a worker's team: SFT and lightning, a death, a cancel, and what is published."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_mcp.engine import stages
from opd_mcp.engine.context import (
    Context,
    DistillInputs,
    ResponsesInputs,
    RolloutInputs,
    RoundInputs,
    ScoreInputs,
    SftInputs,
    SilentReporter,
)
from opd_mcp.identity.consistency import teacher_context
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.identity import TeacherClaim
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.schemas.runs import ModelInput, RunInputs, RunRecord, RunRequest
from opd_mcp.worker.teams.ranks import RankTeam, RankWork

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
SHORT = {
    "responses.limit": 24,
    "sft.steps": 6,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "rollout.count": 40,
    "rollout.sampling.max_new_tokens": 16,
    "distill.steps": 6,
    "distill.batch_size": 8,
    "checkpoint.steps": 1,
}


TOLD = "Add the numbers."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teacher responses, the student after an SFT by one process, and its cache."""
    torch.set_num_threads(1)
    root, recipe = tmp_path_factory.mktemp("made"), resolve_recipe("demo", SHORT)
    context = Context(recipe.runtime, recipe.prompting)
    paths = {name: root / name for name in ("responses", "sft", "rollouts", "cache", "plain")}
    teacher, student = EXAMPLE / "teacher", EXAMPLE / "student"
    given = ResponsesInputs(teacher=teacher, prompts=EXAMPLE / "sft.jsonl")
    stages.generate_responses(recipe.responses, given, paths["responses"], context)
    stages.sft(recipe.sft, SftInputs(student=student, responses=paths["responses"]), paths["sft"], context)
    drawn = RolloutInputs(student=paths["sft"], prompts=EXAMPLE / "opd.jsonl")
    stages.rollout(recipe.rollout, drawn, paths["rollouts"], context)
    scored = ScoreInputs(teacher=teacher, student=paths["sft"], rollouts=paths["rollouts"])
    stages.score(recipe.score, scored, paths["cache"], context)
    inputs = DistillInputs(student=paths["sft"], cache=paths["cache"])
    stages.distill(recipe.distill, inputs, paths["plain"], context)
    return {**paths, "teacher": teacher, "student": student}


def own_teacher(model: Path) -> TeacherClaim:
    """That a student is its own teacher, which sees a system prompt besides."""
    identity = inspect_model(model).identity.model_copy(update={"context": teacher_context(TOLD, None)})
    return TeacherClaim(basis="by_construction", name=model.name, identity=identity)


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path: Path, made: dict[str, Path]):
    """`trained(phase, name, roles, …)`: the phase on two ranks; `at(call, nth, team)` is told of rank 0's calls.

    Its parameter are overrides of the recipe.
    """
    overrides = {"runtime.devices": 2, **getattr(request, "param", {})}

    def run(
        phase: str,
        name: str,
        roles: dict[str, Path],
        at=lambda call, nth, team: None,
        stop: int | None = None,
        number: int | None = None,
        **more: object,
    ):
        directory, counts, heard = tmp_path / name, {}, {}
        directory.mkdir(exist_ok=True)

        def answer(call: str):
            def called(*args):
                counts[call] = counts.get(call, 0) + 1
                heard.setdefault(call, []).append(args)
                at(call, counts[call], team)
                return {"position": 0, "should_stop": counts.get("metric", 0) == stop}.get(call)

            return called

        recipe = resolve_recipe("demo", SHORT | overrides | {"distill.rounds": (number and 2) or 1} | more)
        inputs = RunInputs()
        if recipe.sft.skip:
            claim = own_teacher(roles["student"])
            inputs = RunInputs(student=ModelInput(reference="student", identity=claim.identity, sft_teacher=claim))
        asked = RunRequest(kind="distill", recipe=recipe, inputs=inputs, phases=[])
        record = RunRecord(
            run_id="r", created_at="2026-11-28T00:00:00Z", request_hash="0", request=asked, versions={}, hardware=""
        )
        facts = {
            "record": record.to_dict(),
            "directory": str(directory),
            "paths": {role: str(path) for role, path in roles.items()},
            "phase": phase,
            "round": number,
            "output": str(directory / f"output-{len(list(directory.glob('output-*')))}"),
        }
        names = ("phase", "progress", "metric", "alert", "resumed", "position", "should_stop", "check_fence")
        work = RankWork(facts, [None, None], directory)
        team = RankTeam(work, {call: answer(call) for call in names}, {"made_here": lambda path: True})
        Path(facts["output"]).mkdir()
        return team.trained(), Path(facts["output"]), heard

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def near(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.allclose(found[name].float(), expected[name].float(), rtol=1e-2, atol=1e-3), name


def test_sft_and_lightning_on_two_ranks_are_those_of_one_process_up_to_rounding(trained, made) -> None:
    learnt = {"student": made["student"], "responses": made["responses"], "teacher": made["teacher"]}
    for phase, roles, plain in (
        ("sft", learnt, made["sft"]),
        ("distill", {"student": made["sft"], "cache": made["cache"]}, made["plain"]),
    ):
        summary, output, heard = trained(phase, phase, roles)
        assert (summary.devices, summary.steps) == (2, 6)
        assert [step for step, _ in heard["metric"]] == [1, 2, 3, 4, 5, 6]
        one, two = (
            json.loads((plain / "training.json").read_bytes()),
            json.loads((output / "training.json").read_bytes()),
        )
        assert two["trained_tokens"] == one["trained_tokens"]
        assert two["final"]["loss"] == pytest.approx(one["final"]["loss"], rel=1e-3)
        near(plain, output)
        assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in plain.iterdir())
        assert verified_lineage(output).stage == phase


def test_a_death_and_a_cancel_cost_no_bit(trained, made) -> None:
    roles = {"student": made["sft"], "cache": made["cache"]}
    _, expected, _ = trained("distill", "whole", roles)

    def kill(call: str, nth: int, team: RankTeam) -> None:
        if (call, nth) == ("metric", 4):
            os.kill(team.ranks[1].process.pid, signal.SIGKILL)

    with pytest.raises(OpdError, match=r"rank_lost.* Rank 1 of 2 .*SIGKILL"):
        trained("distill", "killed", roles, kill)
    with pytest.raises(OpdError, match="run_cancelled"):
        trained("distill", "killed", roles, stop=1)  # one more step, then it is stopped
    _, output, heard = trained("distill", "killed", roles)
    assert heard["resumed"][0][0] > 3
    assert "alert" not in heard
    one, other = weights(expected), weights(output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_on_two_ranks_is_judged_in_its_training_as_one_process_judges_it(trained, made, tmp_path) -> None:
    """By the first rank, with the weights of both; what it had found best is saved, after a death as well."""
    judged = {"distill.evaluate_steps": 2, "distill.evaluate_prompts": 6, "distill.keep": "best"}
    recipe = resolve_recipe("demo", SHORT | judged)
    roles = {"student": made["sft"], "cache": made["cache"], "teacher": made["teacher"]}
    roles["eval_prompts"] = EXAMPLE / "eval.jsonl"

    def kill(call: str, nth: int, team: RankTeam) -> None:
        if (call, nth) == ("metric", 5):
            os.kill(team.ranks[1].process.pid, signal.SIGKILL)

    with pytest.raises(OpdError, match="rank_lost"):
        trained("distill", "judged", roles, kill, **judged)
    _, output, heard = trained("distill", "judged", roles, **judged)
    context, plain = Context(recipe.runtime, recipe.prompting), tmp_path / "plain"
    inputs = DistillInputs(
        student=made["sft"],
        cache=made["cache"],
        judge=made["teacher"],
        held_out=roles["eval_prompts"],
        grading=recipe.benchmark,
    )
    one = stages.distill(recipe.distill, inputs, plain, context).held_out
    two = json.loads((output / "training.json").read_bytes())["held_out"]
    assert [entry["step"] for entry in two["evaluations"]] == [entry.step for entry in one.evaluations] == [2, 4, 6]
    for mine, theirs in zip(two["evaluations"], one.evaluations, strict=True):
        assert mine["reverse_kl"] == pytest.approx(theirs.reverse_kl, rel=0.05)
    assert two["kept_step"] == two["best_step"]
    resumed = heard["resumed"][0][0]
    again = [step for step, values in heard["metric"] if "held_out_reverse_kl" in values]
    assert again == [step for step in (4, 6) if step > resumed > 1]


LIVE = {"distill.method": "live", "rollout.batch_size": 4, "distill.evaluate_steps": 3, "distill.evaluate_prompts": 4}


@pytest.mark.parametrize("adapter", [{}, {"distill.adapter": {"rank": 2, "save": "adapter"}}], ids=["all", "adapter"])
def test_live_on_two_ranks_draws_and_scores_what_one_process_does(adapter, trained, made, tmp_path: Path) -> None:
    """Each rank by whole copies, its share; a rank's death costs no bit. The adapter's base is its own teacher."""
    given = LIVE | adapter
    student = made["teacher"] if adapter else made["sft"]
    roles = {"student": student, "teacher": made["teacher"], "prompts": EXAMPLE / "opd.jsonl"}
    roles["eval_prompts"] = EXAMPLE / "eval.jsonl"
    given |= {"sft.skip": True, "prompting.teacher_system": TOLD} if adapter else {}

    def kill(call: str, nth: int, team: RankTeam) -> None:
        if (call, nth) == ("metric", 5):
            os.kill(team.ranks[1].process.pid, signal.SIGKILL)

    summary, whole, heard = trained("distill", "live", roles, **given)
    assert (summary.devices, [step for step, _ in heard["metric"]]) == (2, [1, 2, 3, 4, 5, 6])
    with pytest.raises(OpdError, match="rank_lost"):
        trained("distill", "killed", roles, kill, **given)
    _, output, again = trained("distill", "killed", roles, **given)
    assert again["resumed"][0][0] > 2
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    one, other = load_file(whole / name), load_file(output / name)
    assert all(torch.equal(one[key], other[key]) for key in one)

    recipe, told = resolve_recipe("demo", SHORT | given), []

    class Told(SilentReporter):
        def metric(self, step, values) -> None:
            told.append(dict(values))

    context = Context(recipe.runtime, recipe.prompting, reporter=Told())
    inputs = DistillInputs(
        student=student,
        teacher=made["teacher"],
        prompts=roles["prompts"],
        rollout=recipe.rollout,
        sft_teacher=own_teacher(student) if adapter else None,
        held_out=roles["eval_prompts"],
        grading=recipe.benchmark,
    )
    stages.distill(recipe.distill, inputs, tmp_path / "plain", context)
    for mine, (_, theirs) in zip(told, heard["metric"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3, abs=1e-6)
        assert mine.keys() == theirs.keys()
        if judged := mine.get("held_out_reverse_kl"):
            assert theirs["held_out_reverse_kl"] == pytest.approx(judged, rel=0.05)
    alone = load_file(tmp_path / "plain" / name)
    assert all(torch.allclose(one[key].float(), alone[key].float(), rtol=1e-2, atol=1e-3) for key in alone)


@pytest.mark.parametrize("trained", [{}, {"runtime.replicas": 2}], indirect=True, ids=["together", "replicas"])
def test_rounds_on_two_ranks_go_on_with_the_optimizer_of_the_round_before(trained, made, tmp_path: Path) -> None:
    """A second round that is killed and resumed is a whole one to the bit, and one process's up to rounding."""
    recipe = resolve_recipe("demo", SHORT | {"distill.rounds": 2})
    context, student = Context(recipe.runtime, recipe.prompting), made["sft"]
    first = {"student": student, "cache": made["cache"]}
    _, output, heard = trained("distill", "first", first, number=1)
    assert [step for step, _ in heard["metric"]] == [1, 2, 3]
    plain = tmp_path / "plain-1"
    of = RoundInputs(number=1, first=0, last=3, final=False, origin=student)
    stages.distill(recipe.distill, DistillInputs(**first, round=of), plain, context)
    one, two = (load_file(folder / "optimizer" / "moments.safetensors") for folder in (plain, output))
    assert sum(value.numel() for value in one.values()) == sum(value.numel() for value in two.values())
    near(plain, output)

    drawn = RolloutInputs(student=output, prompts=EXAMPLE / "opd.jsonl")
    stages.rollout(recipe.rollout, drawn, tmp_path / "rollouts", context)
    scored = ScoreInputs(teacher=made["teacher"], student=output, rollouts=tmp_path / "rollouts")
    stages.score(recipe.score, scored, tmp_path / "cache", context)
    second = {"student": student, "model": output, "cache": tmp_path / "cache"}

    def kill(call: str, nth: int, team: RankTeam) -> None:
        if (call, nth) == ("metric", 2):
            os.kill(team.ranks[1].process.pid, signal.SIGKILL)

    _, whole, heard = trained("distill", "second", second, number=2)
    assert [step for step, _ in heard["metric"]] == [4, 5, 6]
    with pytest.raises(OpdError, match="rank_lost"):
        trained("distill", "killed", second, kill, number=2)
    _, resumed, _ = trained("distill", "killed", second, number=2)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    of = RoundInputs(number=2, first=3, last=6, final=True, origin=student, before=plain)
    inputs = DistillInputs(student=output, cache=tmp_path / "cache", round=of)
    stages.distill(recipe.distill, inputs, tmp_path / "plain-2", context)
    near(tmp_path / "plain-2", whole)
