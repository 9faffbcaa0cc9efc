"""An engine that draws the rollouts of a student while it trains: it is given its weights every few steps.

Whoever starts engines gives them in place where the engine can, else starts it again. In between the rollouts are those
of the student as it was: the training's drift from the behaviour policy (`drift_mean`, `effective_sample_share`) says
what that costs. A copy of the weights stays on the disk as long as a checkpoint lies between it and the next: a resumed
training draws what it would have drawn.
"""

import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from opd_mcp.engine.context import Context, EngineWish
from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import Generator
from opd_mcp.engine.generation.served import generator_gap, opened_generator, require_fits
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.saving import SavedForm
from opd_mcp.engine.training.checkpoints import BUILDING_PREFIX, saved_checkpoints
from opd_mcp.identity.files import publish_directory
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.identity import EngineFacts

PREFIX = "served-"
# Log-probs this much farther from the model's here than after a start: not all weights were taken in place.
FARTHER, LEAST_GAP = 4.0, 1e-5


@dataclass
class EngineFollower:
    """Draws from copies of `student` on an engine of this kind, made in the given form every `every` steps.

    A context manager; at its end no engine is left. `length` are the tokens of the longest row of all. `facts` say what
    drew last.
    """

    student: LoadedModel
    form: SavedForm
    kind: str
    every: int
    length: int
    context: Context
    facts: EngineFacts | None = None
    _open: ExitStack = field(default_factory=ExitStack)
    _folder: TemporaryDirectory[str] | None = None
    _generator: Generator | None = None
    _served: int | None = None
    _in_place: bool = True
    _usual_gap: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()
        if self._folder is not None:
            self._folder.cleanup()

    def draw(self, step: int, prompts: Sequence[EncodedPrompt], settings: GenerationSettings) -> Sequences:
        """The rollouts of a step, by the weights of this step or of the last one that began a stretch.

        Raises RunError `engine_disagrees` where an engine does not compute the student that it was just given, and what
        `opened_generator` raises.
        """
        begins = step // self.every * self.every
        if self._generator is None or self._served is None or self._served < begins:
            copy = self.copies / f"{PREFIX}{begins:08d}"
            # one of an earlier attempt, whose checkpoint is of a later step than the copy
            self._served = begins if copy.is_dir() else step
            self._begin(self.copies / f"{PREFIX}{self._served:08d}", settings.batch_size)
        assert self._generator is not None, "it was opened"
        drawn = self._generator.draw(prompts, settings)
        if self._served == step and not self._is_student(drawn):
            self._in_place = False
            self.context.reporter.alert(
                "engine_restarted",
                f"{self.kind} was given the student's weights in place and computes another model; it is started again "
                "on them, now and every time.",
            )
            self._begin(self.copies / f"{PREFIX}{step:08d}", settings.batch_size)
            drawn = self._generator.draw(prompts, settings)
            generator_gap(self._generator, drawn, self.student, self.context)
        return drawn

    def _is_student(self, drawn: Sequences) -> bool:
        """Whether the engine computes the student that it was given; raises RunError `engine_disagrees` after a start.

        vLLM on a CPU leaves a tied head as it was, which is a smaller error than a bound for rounding finds.
        """
        assert self._generator is not None, "it has drawn"
        started = self._usual_gap is None or not self._in_place
        try:
            gap = generator_gap(self._generator, drawn, self.student, self.context)
        except RunError:
            if started:
                raise
            return False
        if gap is None:
            return True
        if started:
            self._usual_gap = gap.mean
        return gap.mean <= max(FARTHER * (self._usual_gap or 0.0), LEAST_GAP)

    @property
    def copies(self) -> Path:
        """Where copies of the weights are: with the checkpoints, which end with the run."""
        if self.context.checkpoints is not None:
            return self.context.checkpoints
        self._folder = self._folder or TemporaryDirectory(prefix="opd-served-")
        return Path(self._folder.name)

    def _begin(self, copy: Path, requests: int) -> None:
        self._open.close()
        self._open, self._generator = ExitStack(), None
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            building = copy.with_name(f"{BUILDING_PREFIX}{secrets.token_hex(6)}")
            self.form.save_copy(self.student.model, building)
            publish_directory(building, copy, self.context.check_fence)
        self._remove_unneeded(copy)
        served = replace(self.student, path=copy)
        dtype, fresh = self.context.runtime.dtype, not self._in_place
        wish = EngineWish(self.kind, copy, dtype, self.length, beside_training=True, fresh=fresh)
        generator = opened_generator(wish, served, requests, self.context)
        self._generator = self._open.enter_context(generator)
        require_fits(self._generator, self.length)
        self.facts = self._generator.facts

    def _remove_unneeded(self, copy: Path) -> None:
        """Remove the copies of stretches that no checkpoint lies in."""
        steps = [int(path.name.rpartition("-")[2]) for path in saved_checkpoints(self.copies)]
        kept = {copy.name, *(f"{PREFIX}{step // self.every * self.every:08d}" for step in steps)}
        for path in self.copies.glob(f"{PREFIX}*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
