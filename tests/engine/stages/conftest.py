"""A small pipeline that the stages' tests share, and what a stage warned of."""

from dataclasses import dataclass
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
    ScoreInputs,
    SftInputs,
    SilentReporter,
)
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.resolve import resolve_recipe

SHORT = {
    "responses.limit": 24,
    "sft.steps": 6,
    "sft.batch_size": 8,
    "rollout.count": 40,
    "rollout.shard_rows": 16,
    "rollout.sampling.max_new_tokens": 24,
    "distill.steps": 4,
    "distill.batch_size": 8,
    "benchmark.limit": 12,
    "benchmark.samples_per_prompt": 2,
    "benchmark.kl_prompts": 6,
}


class Alerts(SilentReporter):
    """Keeps what the stages warn of."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def alert(self, code: str, message: str) -> None:
        self.said[code] = message


@dataclass(frozen=True)
class Made:
    """One small pipeline up to the teacher cache."""

    root: Path
    teacher: Path
    prompts: Path
    recipe: Recipe
    context: Context

    @property
    def sft(self) -> Path:
        return self.root / "sft"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def distill(self, output: str, **changes: object) -> Path:
        """A lightning run from the cache, with changed arguments."""
        given: dict = {"student": self.sft, "cache": self.cache} | changes
        recipe, context = given.pop("recipe", self.recipe.distill), given.pop("context", self.context)
        stages.distill(recipe, DistillInputs(**given), self.root / output, context)
        return self.root / output


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("stages")
    example = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
    teacher, student = example / "teacher", example / "student"
    recipe = resolve_recipe("demo", SHORT)
    context = Context(recipe.runtime, recipe.prompting)
    stages.generate_responses(
        recipe.responses, ResponsesInputs(teacher=teacher, prompts=example / "sft.jsonl"), root / "responses", context
    )
    stages.sft(recipe.sft, SftInputs(student=student, responses=root / "responses"), root / "sft", context)
    stages.rollout(
        recipe.rollout, RolloutInputs(student=root / "sft", prompts=example / "opd.jsonl"), root / "rollouts", context
    )
    stages.score(
        recipe.score,
        ScoreInputs(teacher=teacher, student=root / "sft", rollouts=root / "rollouts"),
        root / "cache",
        context,
    )
    return Made(root, teacher, example / "opd.jsonl", recipe, context)


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")
