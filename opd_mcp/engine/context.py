"""What every stage is given besides its recipe section: the runtime, the prompting rules, and a reporter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from opd_mcp.identity.signatures import MadeHere, everywhere
from opd_mcp.schemas.recipes import CheckpointRecipe, PromptingRecipe, RuntimeRecipe


class Reporter(Protocol):
    """Where a stage tells how it is going; a stage knows nothing of runs, databases or MCP."""

    def phase(self, name: str) -> None:
        """A part of the stage begins."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` units are finished."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Named values at a training step."""

    def alert(self, code: str, message: str) -> None:
        """Something the user should know while the stage goes on."""

    def resumed(self, step: int) -> None:
        """Training goes on after this step of an earlier attempt; what was told of later steps counts no more."""

    def position(self) -> int:
        """Make all that was told so far durable, and say how far that is."""

    def should_stop(self) -> bool:
        """Whether the stage shall stop; it then raises RunError `run_cancelled` at its next step."""


class SilentReporter:
    """A reporter for library use and tests: says nothing, never stops."""

    def phase(self, name: str) -> None:
        """Nothing is said."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Nothing is said."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is said."""

    def alert(self, code: str, message: str) -> None:
        """Nothing is said."""

    def resumed(self, step: int) -> None:
        """Nothing is said."""

    def position(self) -> int:
        """Nothing was kept."""
        return 0

    def should_stop(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Context:
    """Shared by all stages of a run."""

    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    prompting: PromptingRecipe = field(default_factory=PromptingRecipe)
    reporter: Reporter = field(default_factory=SilentReporter)
    teacher_key: str | None = field(default=None, repr=False)
    """The bearer token of a remote teacher; from the environment, by way of the command line, into no file."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    checkpoints: Path | None = None
    """Where a training stage keeps its checkpoints and finds those of an earlier attempt; None: nowhere."""
    made_here: MadeHere = everywhere
    """Whether a directory's lineage proves its claims. A workspace asks its key. Who calls the stages as a library, and
    says nothing, vouches for every directory that it names."""
    check_fence: Callable[[], None] = lambda: None
    """Raises once somebody else has taken over: asked right before a write that others see, from any thread."""
