"""What resources and the dashboard read of runs and artifacts, as text."""

import json
from collections.abc import Iterable
from pathlib import Path

from opd_mcp.identity.lineage import read_lineage
from opd_mcp.schemas.errors import UnknownIdError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.store.logs import log_page
from opd_mcp.store.runs import LOG_FILE, run_directory
from opd_mcp.store.store import Store
from opd_mcp.views.metrics import metrics_report

REPORT_TEXT, REPORT_JSON, REPORT_PAGE, CARD = "report.md", "report.json", "report.html", "README.md"
LOG_LINES = 200
MAX_IDS = 1_000


def recipe_json(store: Store, run_id: str) -> str:
    """A run's resolved recipe; raises UnknownIdError `unknown_run`."""
    return store.record(run_id).request.recipe.to_json(indent=2)


def metrics_json(store: Store, run_id: str) -> str:
    """A run's metrics in full length of 200 points; raises UnknownIdError `unknown_run`."""
    return metrics_report([(store.record(run_id), store.view(run_id, keep_series=True))], (), 200).to_json()


def log_tail(store: Store, run_id: str) -> str:
    """The last lines of a run's log; raises UnknownIdError `unknown_run`."""
    page = log_page(run_id, run_directory(store.workspace, run_id) / LOG_FILE, tail=LOG_LINES)
    return "\n".join(page.lines)


def report_markdown(store: Store, run_id: str) -> str:
    """The report that a run ended with; raises as `report_file`."""
    return report_file(store, run_id).read_text(encoding="utf-8")


def report_file(store: Store, run_id: str) -> Path:
    """The report that a run ended with; raises as `report_folder`."""
    folder = report_folder(store, run_id)
    text = folder / REPORT_TEXT
    return text if text.is_file() else folder / REPORT_JSON


def latest_with_report(store: Store) -> str | None:
    """The id of the newest run that has a report; None where none has."""
    runs = (row.run_id for row in store.index.runs() if store.exists(row.run_id))
    return next((run_id for run_id in runs if "benchmark" in store.view(run_id).artifacts), None)


def report_page(store: Store, run_id: str) -> str:
    """The report as an HTML page; raises as `report_folder`, and where an earlier version wrote none."""
    page = report_folder(store, run_id) / REPORT_PAGE
    if not page.is_file():
        raise _no_document("This report has no page: an earlier version wrote it.", run_id, "Read report.md instead.")
    return page.read_text(encoding="utf-8")


def report_folder(store: Store, run_id: str) -> Path:
    """The directory of a run's report; raises UnknownIdError `unknown_run`, or `unknown_artifact` without one."""
    artifact_id = store.view(run_id).artifacts.get("benchmark")
    if artifact_id is None:
        phases = [phase.name for phase in store.record(run_id).request.phases]
        if "benchmark" in phases:
            raise _no_document("This run has no report yet.", run_id, "Wait for its benchmark phase.")
        other = latest_with_report(store)
        fix = f"The newest run with a report is {other}." if other else "Measure a model with benchmark_student."
        raise _no_document("This run measures nothing, so it has no report.", run_id, fix)
    return store.artifacts.get(artifact_id).path


def export_card(store: Store, run_id: str) -> Path:
    """Where the card of a run's export is; raises UnknownIdError `unknown_run`, or `unknown_artifact` without one."""
    export = store.record(run_id).request.inputs.export
    if export is None or store.view(run_id).state != "succeeded":
        raise _no_document("This run has exported nothing.", run_id, "Export the student with export_student.")
    return Path(export.destination) / CARD


def _no_document(message: str, run_id: str, fix: str) -> UnknownIdError:
    call = next_call("get_run_status", run_id=run_id)
    return UnknownIdError("unknown_artifact", message, value=run_id, fix=fix, call=call)


def lineage_json(store: Store, artifact_id: str) -> str:
    """An artifact's record and lineage, `proven` where this workspace wrote it, else `asserted`.

    Raises UnknownIdError `unknown_artifact`.
    """
    artifact = store.artifacts.get(artifact_id)
    lineage = read_lineage(artifact.path)
    content: dict[str, object] = {"artifact": artifact.record.to_dict(), "lineage": {}}
    if lineage is not None:
        content["lineage"] = lineage.to_dict()
        content["lineage_basis"] = "proven" if store.artifacts.made_here(artifact.path) else "asserted"
    return json.dumps(content, indent=2)


def known_ids(store: Store, name: str) -> list[str]:
    """The ids that complete `run_id` or `artifact_id`, newest first."""
    if name == "artifact_id":
        return [row.artifact_id for row in store.index.artifacts_before(None, None, MAX_IDS)]
    return store.index.newest_runs(MAX_IDS)


def change_tokens(store: Store, watched: Iterable[str]) -> dict[str, str]:
    """By id, for the active runs and those watched so far, a text that changes with every line of their journal."""
    ids = dict.fromkeys([*store.active_runs(), *watched])
    return {run_id: store.views.look(run_id, lambda view: f"{view.state}/{view.records}") for run_id in ids}
