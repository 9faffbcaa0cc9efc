"""Real tiny models: the arithmetic example's, random ones of four tokens for exact checks, and caches made of them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

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
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import open_local
from opd_mcp.engine.scoring.server import RequestLimits, TeacherService, http_server, listening, teacher_app
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.recipes import DistillRecipe, Recipe, RolloutRecipe, ScoreRecipe
from opd_mcp.schemas.resolve import resolve_recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, seed=0)


@pytest.fixture(scope="session")
def example() -> Path:
    return EXAMPLE


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(vocab_size, seed=1)`: a random one-layer Qwen3, sharp enough to differ from uniform."""
    return _tiny_model


def _tiny_model(
    vocab_size: int = 4, *, seed: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).to(dtype).eval()


@dataclass(frozen=True)
class Builder:
    """Builds caches of one student into folders below `root`."""

    root: Path
    student: Path
    recipe: Recipe
    teacher: Path = EXAMPLE / "teacher"
    prompts: Path = EXAMPLE / "opd.jsonl"

    def shorter(self) -> "Builder":
        """Builds of fewer responses, steps and rollouts."""
        few = {"responses": {"limit": 9}, "sft": {"steps": 3}, "rollout": {"count": 16}}
        sections = {name: getattr(self.recipe, name).model_copy(update=update) for name, update in few.items()}
        return replace(self, recipe=self.recipe.model_copy(update=sections))

    def context(self, **changes: object) -> Context:
        return Context(self.recipe.runtime, self.recipe.prompting, **changes)

    def rollouts(
        self, name: str, *, recipe: RolloutRecipe | None = None, context: Context | None = None, **changes: Any
    ) -> Path:
        inputs = RolloutInputs(**({"student": self.student, "prompts": self.prompts} | changes))
        stages.rollout(recipe or self.recipe.rollout, inputs, self.root / name, context or self.context())
        return self.root / name

    def cache(
        self,
        rollouts: Path,
        name: str,
        *,
        recipe: ScoreRecipe | None = None,
        context: Context | None = None,
        **changes: Any,
    ) -> Path:
        given = {"teacher": self.teacher, "student": self.student, "rollouts": rollouts} | changes
        section = recipe or self.recipe.score
        stages.score(section, ScoreInputs(**given), self.root / name, context or self.context())
        return self.root / name

    def distilled(self, cache: Path, name: str, recipe: DistillRecipe | None = None) -> Path:
        inputs = DistillInputs(student=self.student, cache=cache)
        stages.distill(recipe or self.recipe.distill, inputs, self.root / name, self.context())
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
        ResponsesInputs(teacher=EXAMPLE / "teacher", prompts=EXAMPLE / "sft.jsonl"),
        root / "responses",
        context,
    )
    stages.sft(recipe.sft, SftInputs(student=EXAMPLE / "student", responses=root / "responses"), root / "sft", context)
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


class Serving:
    """`serve-teacher` of one of the example's models in a thread, at a free port unless one is given."""

    def __init__(self, model: str, key: str, limits: RequestLimits, port: int = 0) -> None:
        torch.set_num_threads(1)
        teacher = open_local(EXAMPLE / model, Runtime(torch.device("cpu"), torch.float32, seed=0), 4096)
        self.service = TeacherService(teacher, limits)
        self._socket = listening("127.0.0.1", port)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = http_server(teacher_app(self.service, key))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        self.service.close()


@pytest.fixture(scope="session")
def serve_model() -> Callable[..., Serving]:
    """`serve_model(name, key, limits, port)`: the running server; its user closes it."""
    return lambda model, key, limits=None, port=0: Serving(model, key, limits or RequestLimits(), port)
