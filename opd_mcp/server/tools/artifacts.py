"""The tools for what runs made: `list_artifacts`, and `delete_artifact` where the server was started with it."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.planning.confirmation import Question
from opd_mcp.schemas.answers import ArtifactList, DeletedArtifact
from opd_mcp.schemas.cache import CacheInspection
from opd_mcp.schemas.requests import DeleteArtifact, InspectCache, ListArtifacts
from opd_mcp.server.protocol.tool_spec import Reply, ToolSpec
from opd_mcp.server.render.caches import inspection_text
from opd_mcp.server.render.listings import artifacts_text, deleted_text
from opd_mcp.server.serve import ServerSettings
from opd_mcp.service import JobService


def specs(service: JobService, settings: ServerSettings) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def list_artifacts(request: ListArtifacts, context: Context) -> Reply:
        found = await to_thread.run_sync(service.list_artifacts, request)
        return Reply(found, artifacts_text(found))

    listing: ToolSpec[Any] = ToolSpec(
        name="list_artifacts",
        title="List artifacts",
        description="What finished phases made (prompts, responses, models, caches, reports), newest first, in pages.",
        request=ListArtifacts,
        answer=ArtifactList,
        call=list_artifacts,
        read_only=True,
        opaque=frozenset({"ArtifactRow"}),
    )
    return [listing, _deletion(service)] if settings.allow_delete else [listing]


def _deletion(service: JobService) -> ToolSpec[Any]:
    async def delete_artifact(request: DeleteArtifact, context: Context) -> Reply:
        deleted = await to_thread.run_sync(service.delete_artifact, request.artifact_id)
        return Reply(deleted, deleted_text(deleted))

    async def ask(request: DeleteArtifact) -> Question | None:
        return await to_thread.run_sync(service.deletion_question, request.artifact_id)

    return ToolSpec(
        name="delete_artifact",
        title="Delete an artifact",
        description="Deletes an artifact for good, after the user's yes; refuses one that another artifact or an "
        "active run needs.",
        request=DeleteArtifact,
        answer=DeletedArtifact,
        call=delete_artifact,
        read_only=False,
        destructive=True,
        ask=ask,
    )


def cache_specs(service: JobService) -> list[ToolSpec[Any]]:
    """The tools of this topic."""

    async def inspect_cache(request: InspectCache, context: Context) -> Reply:
        found = await to_thread.run_sync(service.inspect_cache, request.cache)
        return Reply(found, inspection_text(found))

    return [
        ToolSpec(
            name="inspect_cache",
            title="Inspect a teacher cache",
            description="Manifest, statistics, two decoded rows with log-probs.",
            request=InspectCache,
            answer=CacheInspection,
            call=inspect_cache,
            read_only=True,
            opaque=frozenset({"CacheManifest", "SampleRow"}),
        )
    ]
