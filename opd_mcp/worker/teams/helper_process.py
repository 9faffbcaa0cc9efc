"""A helper as a process of its own: `python -m opd_mcp.worker.teams.helper_process`, jobs as lines on stdin.

It computes the parts of each job that no other process is at, with the model that the job names.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opd_mcp.schemas.identity import BaseForm
from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.worker.log import logging_to_stderr
from opd_mcp.worker.teams.rank_process import end_with

if TYPE_CHECKING:
    from opd_mcp.engine.models.loading import LoadedModel

logger = logging.getLogger("opd_mcp.worker.teams.helper_process")  # this module is run, so its name is another


class Helper:
    """This process's model and runtime; a model stays until a job names another."""

    def __init__(self, settings: RuntimeRecipe) -> None:
        from opd_mcp.engine.runtime import open_runtime, return_large_blocks

        self.runtime = open_runtime(settings)
        return_large_blocks()
        self._held: tuple[object, LoadedModel] | None = None

    def help_with(self, folder: Path) -> None:
        """Compute parts of a job until all are there, or the job is over."""
        from opd_mcp.engine.generation.generator import drawing_of, drawn_part
        from opd_mcp.engine.parts import read_job, work_off
        from opd_mcp.engine.scoring.local import rows_to_score, scored_part

        try:
            job, rows = read_job(folder)
            model = self._model(job.model, job.form, generates=job.kind == "draw")
            if job.kind == "draw":
                prompts, settings = drawing_of(job, rows)
                work_off(folder, job.parts, lambda number: drawn_part(model, prompts, settings, number))
            else:
                sequences = rows_to_score(rows)
                work_off(folder, job.parts, lambda number: scored_part(model, sequences, job, self.runtime, number))
        except FileNotFoundError:
            if folder.exists():
                raise

    def _model(self, path: Path, form: BaseForm, *, generates: bool) -> "LoadedModel":
        from opd_mcp.engine.models.loading import load_model
        from opd_mcp.identity.models import inspect_model

        wanted = (path, form, generates)
        if self._held is None or self._held[0] != wanted:
            self._held = None  # before the next one: two would be in memory together
            self._held = wanted, load_model(inspect_model(path, form=form), self.runtime, generates=generates)
        return self._held[1]


def main() -> None:
    """Help until stdin ends; the exit status is 1 after an error, which the log has."""
    facts = json.loads(sys.stdin.buffer.readline())
    end_with(facts["worker"])
    status = 1
    with logging_to_stderr():
        try:
            from opd_mcp.worker.main import engine_stages

            engine_stages()
            helper = Helper(RuntimeRecipe.model_validate(facts["runtime"]))
            for line in sys.stdin.buffer:
                helper.help_with(Path(json.loads(line)["job"]))
            status = 0
        except BaseException as error:  # of any kind: what it was at is computed elsewhere
            logger.error("A helper failed", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
