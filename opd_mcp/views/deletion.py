"""Deleting a run: with the artifacts that nothing else needs; what goes, what stays and what is lost is said before."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from opd_mcp.identity.files import fsync_directory
from opd_mcp.planning.confirmation import Question, run_deletion_question
from opd_mcp.schemas.answers import DeletedRun
from opd_mcp.schemas.errors import IntegrityError, RunError
from opd_mcp.schemas.next_action import next_call
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord, RunState
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.artifacts import BUILDING_PREFIX, Artifact
from opd_mcp.store.files import tree_bytes
from opd_mcp.store.runs import acquire_run, claimed_attempt, run_ids
from opd_mcp.store.store import Store
from opd_mcp.views.artifacts import delete_artifact, descends_by_lineage, descends_by_run, used_by

NAMED = 8


@dataclass(frozen=True)
class RunDeletion:
    """What deleting a run would do: `goes` are artifacts, `stays` those that are needed, with what needs them."""

    record: RunRecord
    state: RunState
    bytes: int
    goes: list[Artifact]
    stays: dict[str, str]

    def question(self) -> Question:
        """What the user must agree to."""
        labels = self.record.request.labels
        named = f" {labels.name!r}" if labels.name else ""
        lost = "its settings, metrics, log and checkpoints"
        parts = [
            f"The run{named} ({self.state}, of {self.record.created_at}) goes with {lost}, {byte_size(self.bytes)}."
        ]
        if self.goes:
            listed = [f"{item.artifact_id} ({byte_size(item.record.bytes)})" for item in self.goes]
            parts.append(f"With it go {_some(listed)}.")
        if self.stays:
            parts.append(f"There stay {_some([f'{name} ({why})' for name, why in self.stays.items()])}.")
        if self.state != "succeeded":
            parts.append("It can then not be resumed.")
        if any(item.kind == "report" for item in self.goes):
            parts.append("Comparisons lose its figures.")
        if self.goes:
            parts.append("A run of the same settings would make all of this anew.")
        return run_deletion_question(self.record.run_id, parts)


def run_deletion(store: Store, run_id: str) -> RunDeletion:
    """What deleting a run would do; raises UnknownIdError `unknown_run`, RunError `run_active`."""
    record, view = store.record(run_id), store.view(run_id)
    if view.state in ACTIVE_STATES:
        raise _active(run_id)
    made = set(view.artifacts.values())
    artifacts = store.artifacts.list()
    own = [item for item in artifacts if item.artifact_id in made or item.record.run_id == run_id]
    stays = dict(_needed_by_runs(store, run_id, own))
    goes = [item for item in own if item.artifact_id not in stays]
    others = [item for item in artifacts if item not in goes]
    while needed := dict(_needed_by_artifacts(store, goes, others)):  # what stays needs its own parents in turn
        stays |= needed
        others += [item for item in goes if item.artifact_id in needed]
        goes = [item for item in goes if item.artifact_id not in needed]
    return RunDeletion(record, view.state, tree_bytes(view.directory), goes, stays)


def delete_run(store: Store, run_id: str) -> DeletedRun:
    """The run deleted with its artifacts; it disappears at once, also if the removal is interrupted.

    Raises UnknownIdError `unknown_run`, RunError `run_active`, or `run_locked` while it is being resumed.
    """
    seen = claimed_attempt(store.workspace.run(run_id)) if store.exists(run_id) else 0
    deletion = run_deletion(store, run_id)
    directory = store.workspace.run(run_id)
    with acquire_run(directory, seen):  # no worker has it, and none can get it from here on
        gone = store.workspace.root / f"{BUILDING_PREFIX}deleted-{secrets.token_hex(6)}"
        os.rename(directory, gone)
    fsync_directory(store.workspace.runs)
    fsync_directory(store.workspace.root)
    store.forget(run_id)
    freed, deleted, stays = deletion.bytes, [], dict(deletion.stays)
    for artifact in reversed(_parents_first(store, deletion.goes)):
        try:
            freed += delete_artifact(store, artifact.artifact_id).freed_bytes
            deleted.append(artifact.artifact_id)
        except IntegrityError as error:  # a run began to use it meanwhile
            stays[artifact.artifact_id] = error.message
    tracking = store.workspace.tracking
    for left in (gone, store.workspace.tracking_of(run_id), tracking / "tensorboard" / run_id):
        shutil.rmtree(left, ignore_errors=True)
    return DeletedRun(
        run_id=run_id,
        freed_bytes=freed,
        artifacts=deleted,
        kept=stays,
        next_action=next_call("list_runs", "See what is left."),
    )


def _needed_by_runs(store: Store, run_id: str, own: Iterable[Artifact]) -> Iterator[tuple[str, str]]:
    """The artifacts that another run was given, made or reuses, with that run."""
    ids = {item.artifact_id for item in own}
    for other in run_ids(store.workspace):
        if other != run_id and ids:
            for artifact_id in sorted(ids & used_by(store.record(other))):
                ids.discard(artifact_id)
                yield artifact_id, f"of {other} too"


def _needed_by_artifacts(
    store: Store, goes: Iterable[Artifact], others: Iterable[Artifact]
) -> Iterator[tuple[str, str]]:
    """Those from which an artifact that stays descends."""
    for item in goes:
        for other in others:
            if descends_by_lineage(other, item) or descends_by_run(store, other, item):
                yield item.artifact_id, f"{other.artifact_id} descends from it"
                break


def _parents_first(store: Store, artifacts: list[Artifact]) -> list[Artifact]:
    """The artifacts, each after those that it descends from; deletion refuses a parent before its child."""
    left, ordered = list(artifacts), []
    while left:
        roots = [
            item for item in left if not any(other is not item and descends_by_lineage(item, other) for other in left)
        ]
        chosen = roots or left[:1]
        ordered += chosen
        left = [item for item in left if item not in chosen]
    return ordered


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _active(run_id: str) -> RunError:
    return RunError(
        "run_active",
        "The run is active, and only an ended run can be deleted.",
        value=run_id,
        fix="Cancel it, wait until it has ended, then delete it.",
        call=next_call("cancel_run", run_id=run_id),
    )
