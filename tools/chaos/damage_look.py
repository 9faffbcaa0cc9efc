"""The damage test's half without torch: what a server shows, and the result of a run that reuses everything."""

import os
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.requests import ListArtifacts, StartDistillation
from opd_mcp.service import JobService
from opd_mcp.store.artifacts import artifact_directories
from opd_mcp.store.run_view import RunView
from opd_mcp.store.workspace import Workspace
from opd_mcp.worker import main as worker
from tools.chaos.damage_trials import Damage, answer, fresh_copy, run_trials
from tools.chaos.workload import Place

LOOKED_AT = ("artifact.json", "lineage.json", "manifest.json", "training.json", "report.json", "cost.json")


def look(root: Path, home: Path, run_id: str, rng: random.Random, count: int) -> list[Damage]:
    """Damage to records, journals and the small files of artifacts."""
    copy = root / "home"
    artifacts = artifact_directories(Workspace(home))
    files = [path / name for path in artifacts for name in LOOKED_AT if (path / name).is_file()]
    run = home / "runs" / run_id
    # Nothing can replace a run's journal and record, so they are damaged three times as often.
    files = [*files, *[run / "run.json", run / "journal.jsonl"] * 3, *sorted((home / "plans").glob("*.json"))]
    relative = [file.relative_to(home) for file in files]
    rng.shuffle(relative)
    return run_trials(
        relative, home, count, rng, lambda base: fresh_copy(base, copy), lambda: looks(Place(root), run_id)
    )


def looks(place: Place, run_id: str) -> dict[str, Any]:
    """The answer to each question about the workspace."""
    service = place.service()
    artifacts = [path.name for path in artifact_directories(service.workspace)]
    caches = [name for name in artifacts if name.startswith("cache-")]
    plans = sorted(path.stem for path in service.workspace.plans.glob("*.json"))
    return {
        "record": answer(lambda: service.store.record(run_id).to_dict()),
        "status": answer(lambda: status_of(service.status(run_id).to_dict())),
        "metrics": answer(lambda: metrics_of(place, service.status(run_id).to_dict(), run_id)),
        "list": answer(lambda: service.list_runs().to_dict()),
        "artifacts": answer(lambda: service.list_artifacts(ListArtifacts()).to_dict()),
        "cache": answer(lambda: [service.inspect_cache(name).to_dict() for name in caches]),
        "plan": answer(lambda: [consent(service, name) for name in plans]),
        "reuse": answer(lambda: reused(place, run_id)),
    }


def consent(service: JobService, plan_id: str) -> Any:
    """The question to the user before a plan starts."""
    question = service.start_question(StartDistillation(plan_id=plan_id), gpu_hours=0.0)
    return question and asdict(question)


def status_of(status: dict[str, Any]) -> dict[str, Any]:
    """A status without what depends on the time of the call."""
    return {name: value for name, value in status.items() if name not in ("updated_at", "elapsed_s", "next_action")}


def metrics_of(place: Place, status: dict[str, Any], run_id: str) -> dict[str, Any]:
    """The metric series, with state and alerts."""
    said = {"state": status["state"], "alerts": [alert["code"] for alert in status.get("alerts", [])]}
    points = RunView(place.run_directory(run_id), keep_series=True).fold().series
    return {"said": said, "series": {name: list(series.items()) for name, series in points.items()}}


def reused(place: Place, run_id: str) -> Any:
    """The result of another run of the same request, which finds every phase done."""
    service = place.service()
    first = service.store.record(run_id)
    record = first.model_copy(update={"run_id": "again", "created_at": "2099-01-01T00:00:00.000Z"})
    started = service.store.start_once(record)
    assert started.lock is not None
    with tempfile.TemporaryDirectory() as leases:
        settings = worker.WorkerSettings(LeaseFolder(Path(leases), 1), load_stages=no_stages)
        # In a process of its own: a worker's guardian ends what lives on after the run.
        process = os.fork()
        if process == 0:
            try:
                worker.main(place.root / "home", "again", started.lock.descriptor, settings)
            finally:
                os._exit(0)
        os.waitpid(process, 0)
    status = service.status("again")
    said = {"state": status.state, "error": status.error and status.error.code}
    return {**said, "alerts": [alert.code for alert in status.alerts], **(status.result or {})}


def no_stages() -> Any:
    """A run that would compute anything has noticed the damage."""
    raise IntegrityError("damaged_file", "A phase would be computed again.", fix="Nothing to do.")
