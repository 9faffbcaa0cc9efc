"""The `fetch` phase: downloads a Hub model into the workspace, never a pickle."""

import shutil
from collections.abc import Callable
from pathlib import Path

from opd_mcp.identity.consistency import require_consistent, sft_teacher
from opd_mcp.identity.files import file_sha256, publish_directory
from opd_mcp.identity.lineage import MANIFEST_FILE
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.tokenizers import special_differences
from opd_mcp.planning.hub_models import FETCHED_FILES, hub_directory
from opd_mcp.schemas.errors import IntegrityError, PathError, ResourceError
from opd_mcp.schemas.runs import DataInput, ModelInput, RunInputs, RunRecord
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, new_id
from opd_mcp.worker.fetch_data import with_present_data
from opd_mcp.worker.journal_reporter import JournalReporter
from opd_mcp.worker.pipeline import run_cancelled


def fetched_model(workspace: Workspace, hub_id: str, check_fence: Callable[[], None] = lambda: None) -> Path:
    """The local directory of a Hub model, downloaded unless it is already there.

    `check_fence` is called before the download becomes visible, and raises if it must not.
    Raises ResourceError `offline`, or PathError `not_found` for an id that the Hub does not have or does not release.
    """
    final = hub_directory(workspace, hub_id)
    if final.is_dir():
        return final
    # Imported here: the package is heavy, and most runs never fetch.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    building = final.parent / f".{new_id('building')}"
    building.mkdir(parents=True, mode=0o700)
    try:
        snapshot_download(hub_id, local_dir=building, allow_patterns=list(FETCHED_FILES))
        shutil.rmtree(building / ".cache", ignore_errors=True)
        publish_directory(building, final, check_fence)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise PathError(
            "not_found",
            "The Hub has no such public model.",
            value=hub_id,
            fix="Check the id, or download the model yourself and give its absolute path.",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ResourceError(
            "offline",
            f"The model could not be fetched from the Hub ({type(error).__name__}).",
            value=hub_id,
            fix="Give the machine access to huggingface.co, or copy the model below an allowed root and give its "
            "absolute path.",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def prepared_record(store: Store, record: RunRecord, journal: JournalWriter, reporter: JournalReporter) -> RunRecord:
    """The run's record with Hub models and data sets fetched, and every input checked to be unchanged since the start.

    Raises IntegrityError `input_changed`, ConsistencyError for fetched models that do not belong together, and what
    `fetched_model` and `fetched_data` raise.
    """
    inputs = record.request.inputs
    _require_same_cache(inputs.cache)
    fetches = any(phase.name == "fetch" for phase in record.request.phases)
    if fetches:
        reporter.begin("fetch")
    inputs = with_present_data(store.workspace, store.workspace.run(record.run_id), inputs, journal.check_fence)
    models = [inputs.student, inputs.teacher, inputs.model, *inputs.baselines]
    present: list[ModelInput | None] = []
    for number, model in enumerate(models):
        if reporter.should_stop():
            raise run_cancelled()
        present.append(present_model(store, model, journal.check_fence))
        if fetches:
            reporter.progress(number + 1, len(models), "models")
    student, teacher, measured, *baselines = present
    inputs = inputs.model_copy(
        update={"student": student, "teacher": teacher, "model": measured, "baselines": baselines}
    )
    if fetches:
        _require_belonging(record, inputs)
        journal.append("phase", {"phase": "fetch", "event": "finished"})
    request = record.request.model_copy(update={"inputs": inputs})
    return record.model_copy(update={"request": request})


def _require_same_cache(cache: DataInput | None) -> None:
    if cache is None or cache.path is None or file_sha256(Path(cache.path) / MANIFEST_FILE) == cache.sha256:
        return
    raise IntegrityError(
        "input_changed",
        "The teacher cache is not what it was when the run was started.",
        value=cache.path,
        fix="Start again, with the cache that is meant.",
    )


def present_model(store: Store, model: ModelInput | None, check_fence: Callable[[], None]) -> ModelInput | None:
    """The model with its files here, and what they are; raises IntegrityError `input_changed` for other ones now."""
    if model is None or (model.url is not None and model.path is None):
        return model  # a server's model is checked by a probe
    if model.members:
        members = {domain: present_model(store, member, check_fence) for domain, member in model.members.items()}
        return model.model_copy(update={"members": members})
    path = Path(model.path) if model.path else fetched_model(store.workspace, str(model.hub_id), check_fence)
    facts = inspect_model(path)
    changed = model.identity.differences(facts.identity) if model.identity is not None else set()
    if model.identity is not None and changed:
        raise IntegrityError(
            "input_changed",
            f"The model is {facts.identity.label()} now and was {model.identity.label()} when the run was started; "
            f"changed: {', '.join(sorted(changed))}.",
            value=path,
            fix="Start again, with the model that is meant.",
        )
    claim = model.sft_teacher or sft_teacher(path, made_here=store.artifacts.made_here)
    seen = model.identity.context if model.identity else None
    identity = facts.identity.model_copy(update={"context": seen})
    known = {"path": str(path), "identity": identity, "parameters": facts.parameters, "sft_teacher": claim}
    return model.model_copy(update=known)


def _require_belonging(record: RunRecord, inputs: RunInputs) -> None:
    student, teacher = inputs.student, inputs.teacher
    if student is None or teacher is None or teacher.path is None:
        return
    special_differences(Path(teacher.path), Path(str(student.path)))
    phases = {phase.name for phase in record.request.phases}
    if "sft" not in phases and teacher.identity is not None:
        require_consistent(teacher.identity, student.sft_teacher, allowed=inputs.allow_teacher_mismatch)
