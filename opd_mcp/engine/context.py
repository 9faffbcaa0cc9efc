"""What every stage is given besides its recipe section: the runtime, the prompting rules, and a reporter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from opd_mcp.schemas.recipes import PromptingRecipe, RuntimeRecipe


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

    def should_stop(self) -> bool:
        """Whether the user asked to stop; the stage then raises RunError `run_cancelled` at its next step."""


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
