"""The artifacts of a workspace: listed in pages, and deleted when nothing else needs them."""

import os
import secrets
import shutil
from collections.abc import Iterator

from opd_mcp.identity.files import fsync_directory
from opd_mcp.identity.lineage import read_lineage
from opd_mcp.planning.phases import product
from opd_mcp.schemas.answers import ArtifactList, ArtifactRow, DeletedArtifact
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import IntegrityError, OpdError
from opd_mcp.schemas.identity import ArtifactKind, Parent
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.store.artifacts import BUILDING_PREFIX, Artifact, read_artifact
from opd_mcp.store.store import Store
from opd_mcp.views.next_steps import after_deletion

MANIFEST_FILE = "manifest.json"


def artifact_list(store: Store, kind: ArtifactKind | None, limit: int, cursor: str | None) -> ArtifactList:
    """A page of artifacts, newest first, those with a damaged record only named; the first names the unindexed too.

    Raises ArgumentError `invalid_argument` for a cursor that no page gave.
    """
    total, unindexed = store.artifacts.census(kind)
    found = store.index.artifacts_before(cursor, kind, limit + 1)
    rows, damaged = [], []
    for entry in found[:limit]:
        path = store.workspace.artifacts_of(entry.kind) / entry.artifact_id
        try:
            rows.append(row(read_artifact(path)))
        except IntegrityError:
            damaged.append(entry.artifact_id)
        except FileNotFoundError:  # removed meanwhile
            total -= 1
    if cursor is None:
        damaged += unindexed
    more = len(found) > limit
    next_cursor = f"{found[limit - 1].created_at}/{found[limit - 1].artifact_id}" if more else None
    return ArtifactList(rows=rows, total=total, next_cursor=next_cursor, damaged=sorted(damaged) or None)


def row(artifact: Artifact) -> ArtifactRow:
    """An artifact as a list shows it."""
    record = artifact.record
    return ArtifactRow(
        artifact_id=record.artifact_id,
        kind=record.kind,
        path=str(artifact.path),
        bytes=record.bytes,
        created_at=record.created_at,
        run_id=record.run_id,
    )


def delete_artifact(store: Store, artifact_id: str) -> DeletedArtifact:
    """The space freed; the directory disappears at once, also if its removal is interrupted.

    Raises UnknownIdError `unknown_artifact`, IntegrityError `artifact_needed` naming what needs it.
    """
    artifact = store.artifacts.get(artifact_id)
    needed_by = list(dependents(store, artifact))
    if needed_by:
        raise IntegrityError(
            "artifact_needed",
            f"It is needed by: {', '.join(needed_by[:5])}" + (" and others." if len(needed_by) > 5 else "."),
            value=artifact_id,
            fix=f"Delete or end these first, e.g. {needed_by[0]}, or keep this artifact.",
        )
    gone = artifact.path.with_name(f"{BUILDING_PREFIX}deleted-{secrets.token_hex(6)}")
    os.rename(artifact.path, gone)
    fsync_directory(gone.parent)
    store.index.remove_artifact(artifact_id)
    shutil.rmtree(gone, ignore_errors=True)
    return DeletedArtifact(artifact_id=artifact_id, freed_bytes=artifact.record.bytes, next_action=after_deletion())


def dependents(store: Store, artifact: Artifact) -> Iterator[str]:
    """What needs an artifact: active runs that use or make it, and artifacts whose lineage or run goes back to it."""
    for active in store.active_runs():
        if artifact.artifact_id in used_by(store.record(active)):
            yield active
    for other in store.artifacts.list():
        if other.artifact_id != artifact.artifact_id and (
            descends_by_lineage(other, artifact) or descends_by_run(store, other, artifact)
        ):
            yield other.artifact_id


def used_by(record: RunRecord) -> set[str]:
    """The artifacts that a run was given, reuses or makes."""
    inputs, method = record.request.inputs, record.request.recipe.distill.method
    given = [inputs.student, inputs.teacher, inputs.model, *inputs.baselines, inputs.prompts, inputs.sft_prompts]
    given += [inputs.eval_prompts, inputs.responses, inputs.cache]
    given += (inputs.teacher.members or {}).values() if inputs.teacher else []
    ids = {source.artifact_id for source in given if source is not None and source.artifact_id}
    made = [product(phase.name, phase.key, method) for phase in record.request.phases]
    return (
        ids
        | {item.artifact_id for item in made if item}
        | {p.satisfied_by for p in record.request.phases if p.satisfied_by}
    )


def descends_by_lineage(other: Artifact, artifact: Artifact) -> bool:
    """Whether the other artifact's lineage names this one as a parent."""
    lineage = read_lineage(other.path)
    return lineage is not None and any(is_parent(parent, artifact) for parent in lineage.parents)


def is_parent(parent: Parent, artifact: Artifact) -> bool:
    """Whether a lineage's parent is this artifact: by id, by its weights, or by its manifest."""
    if parent.artifact_id == artifact.artifact_id:
        return True
    if artifact.kind == "model" and parent.identity is not None:
        own = read_lineage(artifact.path)
        parents = [parent.identity, *(parent.identity.members or {}).values()]
        return own is not None and own.model is not None and any(map(own.model.same_model, parents))
    if artifact.kind == "cache" and parent.role == "cache":
        manifest = CacheManifest.from_json((artifact.path / MANIFEST_FILE).read_bytes())
        return parent.sha256 == manifest.content_hash()
    return artifact.kind == "prompts" and parent.sha256 is not None and parent.sha256 == artifact.record.key


def descends_by_run(store: Store, other: Artifact, artifact: Artifact) -> bool:
    """Whether the run that made the other artifact was given this one, or went through it before."""
    if other.record.run_id is None:
        return False
    try:
        record, view = store.record(other.record.run_id), store.view(other.record.run_id)
    except OpdError:
        return False  # the run's directory is gone; the lineage is all there is
    made = list(view.artifacts.values())
    if artifact.artifact_id in made and other.artifact_id in made:
        return made.index(artifact.artifact_id) < made.index(other.artifact_id)
    return artifact.artifact_id in used_by(record) and artifact.artifact_id not in made
