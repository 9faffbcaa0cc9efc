"""Small pipelines that the stages' tests share: one that trains all weights, one that trains adapters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from opd_mcp.engine.models.loading import load_model
from opd_mcp.engine.runtime import open_runtime
from opd_mcp.schemas.identity import BaseForm
from opd_mcp.schemas.recipes import AdapterRecipe, Recipe
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

SHORT_ADAPTER = {
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
    example = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
    made = Pipeline(tmp_path_factory.mktemp("adapters"), example, resolve_recipe("demo", SHORT_ADAPTER))
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
