"""A student with lineage, made once: SFT of the example's student on a few of its teacher's responses."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, SilentReporter
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.recipes import Recipe
from opd_mcp.schemas.resolve import resolve_recipe

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
SHORT = {
    "responses.limit": 24,
    "sft.steps": 30,
    "sft.batch_size": 8,
    "rollout.count": 40,
    "rollout.shard_rows": 8,
    "rollout.sampling.max_new_tokens": 16,
    "score.topk": 4,
    "distill.steps": 3,
    "distill.batch_size": 8,
}


@dataclass(frozen=True)
class Builder:
    """Builds caches of one student into folders below `root`."""

    root: Path
    student: Path
    recipe: Recipe
    teacher: Path = EXAMPLE / "teacher"
    prompts: Path = EXAMPLE / "opd.jsonl"

    def context(self, **changes: object) -> Context:
        return Context(self.recipe.runtime, self.recipe.prompting, **changes)

    def rollouts(self, name: str, **changes: object) -> Path:
        given = {"student": self.student, "prompts": self.prompts, "context": self.context()} | changes
        stages.rollout(given.pop("recipe", self.recipe.rollout), output=self.root / name, **given)
        return self.root / name

    def cache(self, rollouts: Path, name: str, **changes: object) -> Path:
        given = {"teacher": self.teacher, "student": self.student, "context": self.context()} | changes
        recipe = given.pop("recipe", self.recipe.score)
        stages.score(recipe, rollouts=rollouts, output=self.root / name, **given)
        return self.root / name

    def scoring(self, **changes: object) -> object:
        return self.recipe.score.model_copy(update=changes)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root, recipe = tmp_path_factory.mktemp("student"), resolve_recipe("demo", SHORT)
    context = Context(recipe.runtime, recipe.prompting)
    stages.generate_responses(
        recipe.responses,
        teacher=EXAMPLE / "teacher",
        prompts=EXAMPLE / "sft.jsonl",
        output=root / "responses",
        context=context,
    )
    stages.sft(
        recipe.sft, student=EXAMPLE / "student", responses=root / "responses", output=root / "sft", context=context
    )
    return root / "sft"


@pytest.fixture(scope="session")
def drawn(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished rollouts of the student."""
    return Builder(tmp_path_factory.mktemp("drawn"), student, resolve_recipe("demo", SHORT)).rollouts("rollouts")


@pytest.fixture(scope="session")
def finished(student: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache built without interruption."""
    return Builder(tmp_path_factory.mktemp("finished"), student, resolve_recipe("demo", SHORT)).cache(drawn, "cache")


@pytest.fixture
def build(tmp_path: Path, student: Path) -> Builder:
    return Builder(tmp_path, student, resolve_recipe("demo", SHORT))


class Stopping(SilentReporter):
    """Asks to stop once a number of progress reports has come."""

    def __init__(self, after: int) -> None:
        self.left = after

    def progress(self, done: int, total: int, unit: str) -> None:
        self.left -= 1

    def should_stop(self) -> bool:
        return self.left <= 0


@pytest.fixture
def stopping() -> type[Stopping]:
    return Stopping


def content_of(cache: Path) -> str:
    return CacheManifest.from_json((cache / "manifest.json").read_bytes()).content_sha256


@pytest.fixture
def content():
    """The content hash that a cache's manifest states."""
    return content_of
