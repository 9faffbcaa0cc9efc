"""An export to the Hub: built in the run's directory, then one commit to a new private repository."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from httpx2 import HTTPError

from opd_mcp.identity.files import read_json_object, write_atomic
from opd_mcp.identity.lineage import LINEAGE_FILE
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.runs import ExportTarget, RunInputs
from opd_mcp.store.artifacts import ArtifactStore
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.roots import destination_exists
from opd_mcp.worker.exporting import require_export_room

MARK_FILE = "upload.json"
"""In the run's directory: that this run makes the repository; and once all is there, where it is."""
FIRST_COMMIT = frozenset({".gitattributes"})
"""What the Hub itself puts into a new repository."""


@dataclass(frozen=True)
class HubExport:
    """The upload of one run; `directory` is the run's."""

    inputs: RunInputs
    directory: Path
    artifacts: ArtifactStore
    journal: JournalWriter
    token: str | None = field(default=None, repr=False)

    @property
    def target(self) -> ExportTarget:
        """What is asked for."""
        assert self.inputs.export is not None, "an export has a target"
        return self.inputs.export

    @property
    def repository(self) -> str:
        """OWNER/NAME."""
        assert self.target.hub_id is not None, "an upload has a repository"
        return self.target.hub_id

    def is_done(self) -> bool:
        """Whether an earlier attempt of this run uploaded everything, and died before it could say so."""
        return "url" in self._mark()

    def building(self) -> Path:
        """A new directory of the repository's name in the run's own one.

        Raises, before any work, ResourceError `missing_token`, `offline`, `not_enough_disk`, PathError
        `destination_exists`.
        """
        self._require_new()
        require_export_room(self.inputs, self.directory, self.target.destination)
        named = self._folder / self.repository.rpartition("/")[2]
        named.mkdir(parents=True, mode=0o700)
        return named

    def published(self, building: Path) -> None:
        """Sign the lineage if this workspace wrote the model's, and upload everything in one commit.

        Raises ResourceError `offline`, PathError `destination_exists`.
        """
        if self.inputs.model and self.inputs.model.path and self.artifacts.made_here(Path(self.inputs.model.path)):
            self.artifacts.key.key.sign(building)
        names = {str(file.relative_to(building)) for file in building.rglob("*") if file.is_file()}
        assert LINEAGE_FILE in names, "the stage has filled it"
        size = tree_bytes(building)
        begun = self._require_new()
        self.journal.check_fence()
        try:
            if not begun:
                self._note({"repository": self.repository})
                self._api().create_repo(self.repository, private=True)
            elif not set(self._api().list_repo_files(self.repository)) <= names | FIRST_COMMIT:
                raise destination_exists(self.target.destination)
            commit = self._api().upload_folder(
                repo_id=self.repository, folder_path=building, commit_message="Exported by opd-mcp"
            )
        except (OSError, HTTPError) as error:
            raise self._unreachable(error) from error
        self._note({"repository": self.repository, "url": str(commit.repo_url), "bytes": size})

    def remove_building(self) -> None:
        """Remove what this attempt has built."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """What the run's result says of the upload."""
        mark = self._mark()
        about = {"format": self.target.format, "bytes": mark["bytes"], "url": mark["url"], "private": True}
        return {"export": about}

    def _require_new(self) -> bool:
        """Whether this run has begun the repository; raises PathError `destination_exists` for somebody else's."""
        if self.token is None:
            raise ResourceError(
                "missing_token",
                "An upload needs the Hub's token, and HF_TOKEN is not set where this run was started.",
                value=self.target.destination,
                fix="Set HF_TOKEN (a token that may write) for the server, or export to a folder.",
            )
        try:
            exists = self._api().repo_exists(self.repository)
        except (OSError, HTTPError) as error:
            raise self._unreachable(error) from error
        begun = bool(self._mark())
        if exists and not begun:
            raise destination_exists(self.target.destination)
        return exists and begun

    def _unreachable(self, error: Exception) -> ResourceError:
        return ResourceError(
            "offline",
            f"The Hub did not take the upload ({type(error).__name__}: {str(error).splitlines()[0][:200]}).",
            value=self.target.destination,
            fix="Check the network, and that the token may write for this owner; then resume the run.",
            call=resume_call(),
        )

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="opd-mcp")

    @property
    def _folder(self) -> Path:
        return self.directory / f"export-{self.journal.attempt}"

    def _mark(self) -> dict[str, Any]:
        file = self.directory / MARK_FILE
        return read_json_object(file) if file.is_file() else {}

    def _note(self, mark: dict[str, Any]) -> None:
        write_atomic(self.directory / MARK_FILE, json.dumps(mark) + "\n")
