"""Responses, rollouts, scores and benchmark with real helper processes: what one process makes, to the bit."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from opd_mcp.engine import stages
from opd_mcp.engine.context import BenchmarkInputs, Context, ResponsesInputs, RolloutInputs, ScoreInputs, SilentReporter
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.identity import TeacherClaim
from opd_mcp.schemas.resolve import resolve_recipe
from opd_mcp.worker.teams.helpers import COMMAND, HelperTeam

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
TEACHER, STUDENT = EXAMPLE / "teacher", EXAMPLE / "student"
DYING = (sys.executable, "-P", str(Path(__file__).parents[1] / "stand_ins" / "dying_helper.py"))
SHORT = {
    "responses.limit": 24,
    "responses.batch_size": 4,
    "rollout.count": 48,
    "rollout.shard_rows": 24,
    "rollout.batch_size": 4,
    "score.topk": 4,
    "score.micro_batch_tokens": 64,
    "benchmark.limit": 12,
    "benchmark.batch_size": 4,
    "benchmark.samples_per_prompt": 1,
    "benchmark.kl_prompts": 8,
    **{f"{stage}.sampling.max_new_tokens": 12 for stage in ("responses", "rollout", "benchmark")},
}


class PatientTeam(HelperTeam):
    """Lets a helper claim a part of the first job before anything is computed here, or a dying one die."""

    jobs = 0

    def share(self, job: Path) -> None:
        super().share(job)
        self.jobs += 1
        while self.jobs == 1 and self.processes[0].poll() is None:
            if self.command is COMMAND and list(job.glob("*.claim")):
                return
            time.sleep(0.01)


def made(root: Path, context: Context) -> dict[str, object]:
    """What the four phases make, without the seconds that they took."""
    recipe = resolve_recipe("demo", SHORT)
    context = Context(recipe.runtime, recipe.prompting, rendered_at=context.rendered_at, helpers=context.helpers)
    context.reporter.progress = lambda done, total, unit: None
    claim = TeacherClaim(basis="asserted", name="teacher", identity=inspect_model(TEACHER).identity)
    given = ResponsesInputs(teacher=TEACHER, prompts=EXAMPLE / "sft.jsonl")
    stages.generate_responses(recipe.responses, given, root / "responses", context)
    drawn = RolloutInputs(student=STUDENT, prompts=EXAMPLE / "opd.jsonl")
    stages.rollout(recipe.rollout, drawn, root / "rollouts", context)
    scored = ScoreInputs(teacher=TEACHER, student=STUDENT, rollouts=root / "rollouts", sft_teacher=claim)
    stages.score(recipe.score, scored, root / "cache", context)
    judged = BenchmarkInputs(
        models={"student": STUDENT}, prompts=EXAMPLE / "eval.jsonl", recipe_hash="0", teacher=TEACHER
    )
    report = stages.benchmark(recipe.benchmark, judged, root / "report", context).to_dict()
    del report["verdict"]  # its sentence names the seconds
    for model in report["models"]:
        del model["seconds"]
    manifest = json.loads((root / "cache" / "manifest.json").read_bytes())
    record = json.loads((root / "rollouts" / "rollouts.json").read_bytes())
    return {
        "responses": (root / "responses" / "responses.parquet").read_bytes(),
        "rollouts": record["shards"],
        "manifest": manifest,
        "report": report,
    }


@pytest.mark.parametrize("command", [COMMAND, DYING], ids=["helped", "killed"])
def test_any_number_of_helpers_and_a_killed_one_make_what_one_process_makes(command, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = Context(reporter=SilentReporter())
    expected = made(tmp_path / "alone", alone)
    alerts: list[str] = []
    told = [None], resolve_recipe("demo", SHORT).runtime, tmp_path, lambda code, message: alerts.append(code)
    team = PatientTeam(*told, command=command)
    with team.working() as helpers:
        found = made(tmp_path / "helped", Context(rendered_at=alone.rendered_at, helpers=helpers))
        assert helpers.jobs > 6
        assert list(helpers.folder.iterdir()) == []
    assert alerts == (["helper_lost"] if command is DYING else [])  # a claimed part was left by a killed helper
    assert found == expected
