"""A small pipeline that trains adapters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.schemas.identity import BaseForm
from opd_mcp.schemas.recipes import AdapterRecipe, Recipe
from opd_mcp.schemas.resolve import resolve_recipe

SHORT = {
    "responses.limit": 24,
    "sft.steps": 6,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "sft.adapter.rank": 4,
    "rollout.count": 16,
    "rollout.sampling.max_new_tokens": 24,
    "distill.steps": 3,
    "distill.batch_size": 8,
    "distill.adapter.rank": 4,
    "benchmark.limit": 6,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 4,
}


@dataclass(frozen=True)
class Pipeline:
    """The example's models, and stages with an adapter."""

    root: Path
    example: Path
    recipe: Recipe

    @property
    def context(self) -> Context:
        return Context(self.recipe.runtime, self.recipe.prompting)

    def sft(self, name: str, reporter: SilentReporter | None = None, **adapter: Any) -> Path:
        section = self.recipe.sft.model_copy(update={"adapter": AdapterRecipe(rank=4, **adapter)})
        inputs = SftInputs(student=self.example / "student", responses=self.root / "responses")
        context = self.context if reporter is None else replace(self.context, reporter=reporter)
        stages.sft(section, inputs, self.root / name, context)
        return self.root / name

    def cache(self, student: Path, form: BaseForm = "as_saved") -> Path:
        rollouts, cache = (self.root / f"{kind}-{student.name}-{form}" for kind in ("rollouts", "cache"))
        prompts = self.example / "opd.jsonl"
        drawn = RolloutInputs(student=student, prompts=prompts, form=form)
        stages.rollout(self.recipe.rollout, drawn, rollouts, self.context)
        inputs = ScoreInputs(teacher=self.example / "teacher", student=student, rollouts=rollouts, form=form)
        stages.score(self.recipe.score, inputs, cache, self.context)
        return cache

    def distill(self, student: Path, cache: Path, name: str, **adapter: Any) -> Path:
        section = self.recipe.distill.model_copy(update={"adapter": AdapterRecipe(rank=4, **adapter)})
        stages.distill(section, DistillInputs(student=student, cache=cache), self.root / name, self.context)
        return self.root / name


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    torch.set_num_threads(1)
    example = Path(__file__).resolve().parents[4] / "examples" / "arithmetic"
    made = Pipeline(tmp_path_factory.mktemp("adapters"), example, resolve_recipe("demo", SHORT))
    inputs = ResponsesInputs(teacher=example / "teacher", prompts=example / "sft.jsonl")
    stages.generate_responses(made.recipe.responses, inputs, made.root / "responses", made.context)
    return made


@pytest.fixture(scope="session")
def merged(pipeline: Pipeline) -> Path:
    return pipeline.sft("merged")


@pytest.fixture(scope="session")
def kept(pipeline: Pipeline) -> Path:
    return pipeline.sft("kept", save="adapter")


@pytest.fixture(scope="session")
def cache(pipeline: Pipeline, kept: Path) -> Path:
    return pipeline.cache(kept)


def logits(model: Path) -> torch.Tensor:
    runtime = open_runtime(resolve_recipe("demo", {}).runtime)
    with torch.no_grad():
        return load_model(model, runtime).model(torch.arange(1, 12)[None]).logits
