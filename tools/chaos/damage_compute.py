"""The damage test's half with torch: training from damaged caches, models, responses and checkpoints."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_mcp.engine.context import DistillInputs, SftInputs
from opd_mcp.schemas.recipes import CheckpointRecipe, DistillRecipe, Recipe, SftRecipe
from opd_mcp.schemas.reports import TrainingSummary
from tools import EXAMPLE
from tools.chaos.damage_trials import Damage, answer, fresh_copy, run_trials
from tools.chaos.workload import Place

STEPS = 3
CHECKPOINT_STEPS = 2


def compute(root: Path, home: Path, run_id: str, rng: random.Random, count: int) -> list[Damage]:
    """Damage to what training reads: a quarter each for cache, student, responses and checkpoints."""
    import torch

    torch.set_num_threads(1)
    service = Place(home.parent).service()
    recipe, paths = service.store.record(run_id).request.recipe, (service.status(run_id).result or {})["paths"]
    trial = Trial(root, recipe, {role: Path(path) for role, path in paths.items()})
    part = count // 4
    return [
        *trial.damage("cache", part, rng),
        *trial.damage("sft", part, rng),
        *trial.damage("responses", part, rng),
        *trial.damage_checkpoints(count - 3 * part, rng),
    ]


class Recorder:
    """A reporter that keeps alerts and stops after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.alerts: list[str] = []
        self.resumed_at: int | None = None
        self.stop_after, self.steps = stop_after, 0

    def phase(self, name: str) -> None:
        """Nothing is kept."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Nothing is kept."""

    def metric(self, step: int, values: Any) -> None:
        """The step is kept."""
        self.steps = step

    def alert(self, code: str, message: str) -> None:
        """The alert is kept."""
        self.alerts.append(f"{code}: {message}")

    def position(self) -> int:
        """There is no journal."""
        return 0

    def resumed(self, step: int) -> None:
        """The step is kept."""
        self.resumed_at = step

    def should_stop(self) -> bool:
        """Whether `stop_after` steps are done."""
        return self.stop_after is not None and self.steps >= self.stop_after


class Trial:
    """Damages the inputs of tiny trainings, one at a time."""

    def __init__(self, root: Path, recipe: Recipe, paths: dict[str, Path]) -> None:
        from opd_mcp.engine.context import Context

        self.root = root
        self.paths = paths
        self.reporter = Recorder()
        self.context = Context(recipe.runtime, recipe.prompting, self.reporter)
        self.distill = recipe.distill.model_copy(update={"steps": STEPS, "batch_size": 4})
        self.sft = recipe.sft.model_copy(update={"steps": STEPS, "batch_size": 4})

    def damage(self, role: str, count: int, rng: random.Random) -> list[Damage]:
        """Damage to the files of one artifact."""
        source, copy = self.paths[role], self.root / role / self.paths[role].name
        files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        # At least half of the damage hits the files that hold the numbers.
        heavy = [file for file in files if file.suffix in (".parquet", ".safetensors", ".bin")]
        files += heavy * max(1, len(files) // len(heavy) - 1)
        rng.shuffle(files)
        uses = {"cache": {"cache": copy}, "sft": {"student": copy}, "responses": {"responses": copy}}[role]
        copied = lambda base: fresh_copy(base, copy)  # noqa: E731
        return run_trials(files, source, count, rng, copied, lambda: {"training": answer(lambda: self.trained(**uses))})

    def damage_checkpoints(self, count: int, rng: random.Random) -> list[Damage]:
        """Damage to the checkpoints that a stopped training left."""
        source, copy = self.root / "stopped", self.root / "checkpoints"
        self.stop_training(source)
        files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        rng.shuffle(files)
        recipe = self.sft.model_copy(update={"steps": 6})
        return run_trials(
            files,
            source,
            count,
            rng,
            lambda base: fresh_copy(base, copy),
            lambda: {"training": answer(lambda: self.fine_tuned(recipe, self.paths["responses"], copy))},
        )

    def stop_training(self, checkpoints: Path) -> None:
        """Stop a training before its end; it leaves two checkpoints."""
        from opd_mcp.schemas.errors import RunError

        self.reporter.stop_after = 5
        try:
            self.fine_tuned(self.sft.model_copy(update={"steps": 6}), self.paths["responses"], checkpoints)
        except RunError:
            self.reporter.stop_after = None
        assert len(list(checkpoints.iterdir())) == 2, "the last two checkpoints stay"

    def trained(
        self, cache: Path | None = None, student: Path | None = None, responses: Path | None = None
    ) -> dict[str, Any]:
        """What training makes of these inputs, with undamaged ones for those that are not given."""
        if responses is not None:
            return self.fine_tuned(self.sft, responses)
        return self.distilled(self.distill, cache or self.paths["cache"], student or self.paths["sft"])

    def distilled(self, recipe: DistillRecipe, cache: Path, student: Path) -> dict[str, Any]:
        """The distilled model's files."""
        from opd_mcp.engine import stages

        output = self._output()
        summary = stages.distill(recipe, DistillInputs(student=student, cache=cache), output, self.context)
        return self._made(output, summary)

    def fine_tuned(self, recipe: SftRecipe, responses: Path, checkpoints: Path | None = None) -> dict[str, Any]:
        """The fine-tuned model's files, and what the training said."""
        from opd_mcp.engine import stages

        self.reporter.alerts, self.reporter.steps = [], 0
        saved = CheckpointRecipe(steps=CHECKPOINT_STEPS)
        context = replace(self.context, checkpoints=checkpoints, checkpoint=saved)
        output = self._output()
        summary = stages.sft(recipe, SftInputs(student=EXAMPLE / "student", responses=responses), output, context)
        return self._made(output, summary)

    def _output(self) -> Path:
        import shutil

        output = self.root / "output" / "model"
        shutil.rmtree(output, ignore_errors=True)
        return output

    def _made(self, output: Path, summary: TrainingSummary) -> dict[str, Any]:
        names = sorted(path.name for path in output.iterdir() if path.name != "training.json")
        hashes = {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}
        return {"files": hashes, "tokens": summary.trained_tokens}
