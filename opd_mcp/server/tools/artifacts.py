"""The tools for what runs made: teacher caches, the list of artifacts, and deletion where it is offered."""

from typing import Any

from opd_mcp.schemas.answers import ArtifactList, DeletedArtifact, DeletedRun
from opd_mcp.schemas.cache import CacheInspection
from opd_mcp.schemas.requests import DeleteArtifact, DeleteRun, InspectCache, ListArtifacts
from opd_mcp.server.render.caches import inspection_text
from opd_mcp.server.render.workspace import artifacts_text, deleted_run_text, deleted_text
from opd_mcp.server.tools.spec import ToolSpec

INSPECT_CACHE: ToolSpec[Any, Any] = ToolSpec(
    name="inspect_cache",
    title="Inspect a teacher cache",
    description="Manifest, statistics, two decoded rows with log-probs.",
    request=InspectCache,
    answer=CacheInspection,
    call=lambda service, request: service.inspect_cache(request.cache),
    text=inspection_text,
    command="cache inspect {cache}",
    read_only=True,
    opaque=frozenset({"CacheManifest", "SampleRow"}),
)
TOOLS: tuple[ToolSpec[Any, Any], ...] = (
    ToolSpec(
        name="list_artifacts",
        title="List artifacts",
        description="What finished phases made (prompts, responses, models, caches, reports), newest first, in pages.",
        request=ListArtifacts,
        answer=ArtifactList,
        call=lambda service, request: service.list_artifacts(request),
        text=artifacts_text,
        command="artifacts",
        read_only=True,
        opaque=frozenset({"ArtifactRow"}),
    ),
    ToolSpec(
        name="delete_artifact",
        title="Delete an artifact",
        description="Deletes an artifact for good, after the user's yes; refuses one that another artifact or an "
        "active run needs.",
        request=DeleteArtifact,
        answer=DeletedArtifact,
        call=lambda service, request: service.delete_artifact(request.artifact_id),
        text=deleted_text,
        command="rm {artifact_id}",
        destructive=True,
        deletes=True,
        ask=lambda service, request, settings: service.deletion_question(request.artifact_id),
        opaque=frozenset({"NextAction"}),
    ),
    ToolSpec(
        name="delete_run",
        title="Delete a run",
        description="Deletes an ended run for good, and the artifacts that nothing else needs, after the user's yes "
        "to a list of what goes and what stays.",
        request=DeleteRun,
        answer=DeletedRun,
        call=lambda service, request: service.delete_run(request.run_id),
        text=deleted_run_text,
        command="rm {run_id}",
        destructive=True,
        deletes=True,
        ask=lambda service, request, settings: service.run_deletion_question(request.run_id),
        opaque=frozenset({"NextAction"}),
    ),
)
