"""What runs and artifacts are, as resources: templates with completions, and updates of the runs that are active.

`opd://runs/{run_id}/recipe | metrics | log | report`, `opd://artifacts/{artifact_id}/lineage`, and the recipe's keys:
`opd://recipe-keys`.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio import to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.subscriptions import InMemorySubscriptionBus, ResourceUpdated
from mcp_types import Completion, CompletionArgument, PromptReference, ResourceTemplateReference

from opd_mcp.schemas.errors import OpdError, UnknownIdError
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.server.render.recipe_keys import KEYS_URI, recipe_keys_text
from opd_mcp.service import JobService
from opd_mcp.store.store import Store
from opd_mcp.views import resources as reading

logger = logging.getLogger(__name__)
JSON, TEXT, MARKDOWN = "application/json", "text/plain", "text/markdown"
PARTS = ("recipe", "metrics", "log", "report")
WATCH_SECONDS = 2.0
MAX_COMPLETIONS = 100


def add_resources(server: MCPServer[Any], service: JobService, secrets: Sequence[str] = ()) -> None:
    """Register the templates, read in threads and shown without secrets, their completions, and the recipe keys."""
    outgoing = Outgoing(tuple(secrets))

    @server.resource(
        KEYS_URI, mime_type=MARKDOWN, title="Recipe keys", description="Every key that overrides may name."
    )
    async def recipe_keys() -> str:
        return recipe_keys_text()

    @server.resource(
        "opd://runs/{run_id}/recipe",
        mime_type=JSON,
        title="Recipe",
        description="Every setting of the run, as resolved.",
    )
    async def run_recipe(run_id: str) -> str:
        return await _read(service, outgoing, reading.recipe_json, run_id)

    @server.resource(
        "opd://runs/{run_id}/metrics",
        mime_type=JSON,
        title="Metrics",
        description="Its training curves, 200 points each, with trend and diagnosis.",
    )
    async def run_metrics(run_id: str) -> str:
        return await _read(service, outgoing, reading.metrics_json, run_id)

    @server.resource("opd://runs/{run_id}/log", mime_type=TEXT, title="Log", description="The log's last 200 lines.")
    async def run_log(run_id: str) -> str:
        return await _read(service, outgoing, reading.log_tail, run_id)

    @server.resource(
        "opd://runs/{run_id}/report",
        mime_type=MARKDOWN,
        title="Report",
        description="The evidence that a finished run ends with: scores, differences, costs, alerts.",
    )
    async def run_report(run_id: str) -> str:
        return await _read(service, outgoing, reading.report_markdown, run_id)

    @server.resource(
        "opd://artifacts/{artifact_id}/lineage",
        mime_type=JSON,
        title="Lineage",
        description="What an artifact was made from and by, with hashes.",
    )
    async def artifact_lineage(artifact_id: str) -> str:
        return await _read(service, outgoing, reading.lineage_json, artifact_id)

    @server.completion()
    async def complete(
        ref: PromptReference | ResourceTemplateReference, argument: CompletionArgument, context: Any
    ) -> Completion | None:
        if argument.name not in ("run_id", "artifact_id"):
            return None
        ids = await to_thread.run_sync(reading.known_ids, service.store, argument.name)
        found = [known for known in ids if known.startswith(argument.value)]
        return Completion(values=found[:MAX_COMPLETIONS], total=len(found), has_more=len(found) > MAX_COMPLETIONS)


async def _read(service: JobService, outgoing: Outgoing, read: Callable[[Store, str], str], reference: str) -> str:
    """What is read from the store, its errors as those of a resource."""
    try:
        return outgoing.document(await to_thread.run_sync(read, service.store, reference))
    except UnknownIdError as error:
        raise ResourceNotFoundError(outgoing.error(error)) from error
    except OpdError as error:
        raise ResourceError(outgoing.error(error)) from error


class RunWatcher:
    """Tells subscribers when an active run's resources have changed; it looks only while somebody is subscribed."""

    def __init__(self, service: JobService, seconds: float = WATCH_SECONDS) -> None:
        self.bus = CountingBus()
        self._service = service
        self._seconds = seconds
        self._seen: dict[str, str] = {}

    @asynccontextmanager
    async def lifespan(self, server: MCPServer[Any]) -> AsyncIterator[dict[str, Any]]:
        """Watches for as long as the server is up."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch)
            yield {}
            tasks.cancel_scope.cancel()

    async def _watch(self) -> None:
        while True:
            await anyio.sleep(self._seconds)
            if not self.bus.listeners:
                self._seen = {}
                continue
            try:
                await self._look()
            except OpdError:
                logger.exception("Watching the runs failed; trying again")

    async def _look(self) -> None:
        now = await to_thread.run_sync(reading.change_tokens, self._service.store, list(self._seen))
        changed = [run_id for run_id, token in now.items() if self._seen.get(run_id, token) != token]
        for run_id in changed:
            for part in PARTS[1:]:
                await self.bus.publish(ResourceUpdated(uri=f"opd://runs/{run_id}/{part}"))
        self._seen = now


class CountingBus(InMemorySubscriptionBus):
    """The SDK's bus, which also knows whether anybody listens."""

    @property
    def listeners(self) -> int:
        """Open subscriptions."""
        return len(self._listeners)
