"""`inspect_cache`: what a teacher cache holds."""

from typing import Any

from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.jobs.service import JobService
from opd_mcp.schemas.cache import CacheInspection
from opd_mcp.schemas.requests import InspectCache
from opd_mcp.server.cache_texts import inspection_text
from opd_mcp.server.registration import Reply, ToolSpec


def specs(service: JobService) -> list[ToolSpec[Any]]:
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
