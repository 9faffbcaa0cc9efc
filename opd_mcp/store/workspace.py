"""The workspace: one private directory with a fixed layout that holds everything the project writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from opd_mcp.schemas.identity import ArtifactKind
from opd_mcp.store.private import require_private

ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)


def default_workspace_root() -> Path:
    """The platform's user data folder for opd-mcp."""
    from platformdirs import user_data_path

    return user_data_path("opd-mcp", appauthor=False)


@dataclass(frozen=True)
class Workspace:
    """The directories below `root`, made on construction, readable by their owner only."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        object.__setattr__(self, "root", self.root.resolve())
        require_private(self.root)
        kinds = map(self.artifacts_of, ARTIFACT_KINDS)
        for directory in (self.runs, self.artifacts, *kinds, self.plans, self.hub, self.compiled):
            directory.mkdir(exist_ok=True, mode=0o700)

    @property
    def runs(self) -> Path:
        """One directory a run."""
        return self.root / "runs"

    @property
    def artifacts(self) -> Path:
        """One directory a kind, in it one directory an artifact."""
        return self.root / "artifacts"

    @property
    def plans(self) -> Path:
        """One file a plan."""
        return self.root / "plans"

    @property
    def hub(self) -> Path:
        """Models and data sets fetched from the Hub."""
        return self.root / "hub"

    @property
    def compiled(self) -> Path:
        """GPU code that workers compiled, for the next ones; may be deleted."""
        return self.root / "compiled"

    @property
    def index(self) -> Path:
        """The SQLite index; may be deleted, it is rebuilt from the directories."""
        return self.root / "opd.sqlite"

    def artifacts_of(self, kind: ArtifactKind) -> Path:
        """Where artifacts of one kind are."""
        return self.artifacts / kind

    def run(self, run_id: str) -> Path:
        """A run's directory, whether it exists or not; `run_id` must be one that `is_id` accepts."""
        return self.runs / run_id
