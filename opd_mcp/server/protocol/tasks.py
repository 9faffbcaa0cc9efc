"""The tasks extension `io.modelcontextprotocol/tasks` (SEP-2663): a tool call becomes a task to be asked about later.

The extension knows the wire; a `TaskBackend` knows the work. A tool answers as always; when its client declared the
extension, and the backend finds the task that the answer stands for, the answer is replaced by the task's envelope.
All other clients, and the legacy era, get the plain answer: run id and status tool stay the main path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from anyio import to_thread
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import MCP_NAME_HEADER, decode_header_value
from mcp_types import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    INVALID_REQUEST,
    CallToolRequestParams,
    CallToolResult,
    RequestParams,
    TextContent,
)
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import Field

from opd_mcp.schemas.errors import RunError, UnknownIdError
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.server.audit import AuditLog, client_name
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.server.render.runs import status_text, unchanged_text
from opd_mcp.server.serve import ServerSettings
from opd_mcp.service import LATEST, JobService

TASKS_EXTENSION = "io.modelcontextprotocol/tasks"
TaskStatus = Literal["working", "input_required", "completed", "failed", "cancelled"]
TaskSupport = Literal["never", "optional", "required"]
Request = ServerRequestContext[Any, Any]


@dataclass(frozen=True)
class Task:
    """A task as it stands: `result` when completed, `error` (a JSON-RPC error) when failed, times in ISO 8601."""

    task_id: str
    status: TaskStatus
    created_at: str
    updated_at: str
    message: str | None = None
    poll_ms: int | None = None
    ttl_ms: int | None = None
    result: CallToolResult | None = None
    error: Mapping[str, Any] | None = None
    input_requests: Mapping[str, Any] | None = None

    def envelope(self) -> dict[str, Any]:
        """The flat task as every answer shows it; `ttlMs` is null for a task that is kept."""
        flat = {
            "taskId": self.task_id,
            "status": self.status,
            "createdAt": self.created_at,
            "lastUpdatedAt": self.updated_at,
            "ttlMs": self.ttl_ms,
        }
        optional = {"statusMessage": self.message, "pollIntervalMs": self.poll_ms}
        return flat | {name: value for name, value in optional.items() if value is not None}

    def outcome(self) -> dict[str, Any]:
        """What `tasks/get` adds to the envelope."""
        if self.status == "completed" and self.result is not None:
            dumped = self.result.model_dump(by_alias=True, mode="json", exclude_none=True)
            return {"result": {"resultType": "complete", **dumped}}
        if self.status == "failed" and self.error is not None:
            return {"error": dict(self.error)}
        return {"inputRequests": dict(self.input_requests or {})} if self.status == "input_required" else {}


class UnknownTask(LookupError):
    """There is no task of this id."""


class TaskBackend(Protocol):
    """The work behind the tasks; every method but `support` raises UnknownTask for an id that is not one."""

    def support(self, tool: str) -> TaskSupport:
        """Whether a call of the tool never, may or must become a task."""

    async def task_of(self, tool: str, result: CallToolResult) -> Task | None:
        """The durable task that a tool's answer stands for; None when the answer is all there is."""

    async def get(self, task_id: str) -> Task:
        """The task as it stands now."""

    async def update(self, task_id: str, responses: Mapping[str, Any]) -> None:
        """Hand answers to a task's input requests; those without a request are ignored."""

    async def cancel(self, task_id: str, client: str) -> None:
        """Ask a task to stop, in the name of a client; for one that has ended this is nothing."""


class TaskParams(RequestParams):
    """Parameters of `tasks/get` and `tasks/cancel`."""

    task_id: str = Field(alias="taskId")


class UpdateParams(TaskParams):
    """Parameters of `tasks/update`."""

    input_responses: dict[str, Any] = Field(alias="inputResponses")


class TasksExtension(Extension):
    """Serves `tasks/get`, `tasks/update` and `tasks/cancel`, and turns answers of tool calls into tasks."""

    identifier = TASKS_EXTENSION

    def __init__(self, backend: TaskBackend) -> None:
        self._backend = backend

    def methods(self) -> list[MethodBinding]:
        """The three methods, of the modern era only."""
        versions = frozenset(MODERN_PROTOCOL_VERSIONS)
        return [
            MethodBinding("tasks/get", TaskParams, self._get, versions),
            MethodBinding("tasks/update", UpdateParams, self._update, versions),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, versions),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Request, call_next: CallNext
    ) -> HandlerResult:
        """The tool's answer, or the task it stands for where the client declared that it understands one."""
        support = self._backend.support(params.name)
        if support == "required":
            require_client_extension(ctx, TASKS_EXTENSION)
        result = await call_next(ctx)
        if support == "never" or not declares_tasks(ctx) or not isinstance(result, CallToolResult) or result.is_error:
            return result
        task = await self._backend.task_of(params.name, result)
        return result if task is None else {"resultType": "task", **task.envelope()}

    async def _get(self, ctx: Request, params: TaskParams) -> HandlerResult:
        self._admit(ctx, params)
        try:
            task = await self._backend.get(params.task_id)
        except UnknownTask:
            raise unknown_task(params.task_id) from None
        return {"resultType": "complete", **task.envelope(), **task.outcome()}

    async def _update(self, ctx: Request, params: UpdateParams) -> HandlerResult:
        self._admit(ctx, params)
        try:
            await self._backend.update(params.task_id, params.input_responses)
        except UnknownTask:
            raise unknown_task(params.task_id) from None
        return {"resultType": "complete"}

    async def _cancel(self, ctx: Request, params: TaskParams) -> HandlerResult:
        self._admit(ctx, params)
        try:
            await self._backend.cancel(params.task_id, client_name(ctx.session))
        except UnknownTask:
            raise unknown_task(params.task_id) from None
        return {"resultType": "complete"}

    def _admit(self, ctx: Request, params: TaskParams) -> None:
        """Raise -32020 for a routing header that names another task, -32021 for a client without the extension."""
        headers = getattr(ctx.request, "headers", None)
        if headers is not None and decode_header_value(headers.get(MCP_NAME_HEADER)) != params.task_id:
            raise MCPError(HEADER_MISMATCH, f"{MCP_NAME_HEADER} header does not match the request body's 'taskId'")
        require_client_extension(ctx, TASKS_EXTENSION)


def declares_tasks(ctx: Request) -> bool:
    """Whether this request's client understands tasks; only the modern era has them."""
    capabilities = ctx.session.client_capabilities
    extensions = (capabilities.extensions if capabilities else None) or {}
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS and TASKS_EXTENSION in extensions


def unknown_task(task_id: str) -> MCPError:
    """The error of an id that no task has."""
    return MCPError(INVALID_PARAMS, "There is no such task", {"taskId": task_id[:200]})


MIN_POLL_MS = 1_000
MAX_POLL_MS = 10_000


class RunTasks:
    """The backend of the tasks extension over a JobService; `tools` are those that start a run.

    No task holds one of the secrets.
    """

    def __init__(self, service: JobService, tools: frozenset[str], settings: ServerSettings) -> None:
        self._service = service
        self._tools = tools
        self._read_only = settings.read_only
        self._audit = AuditLog(service.workspace, settings.secrets)
        self._outgoing = Outgoing(settings.secrets)

    def support(self, tool: str) -> TaskSupport:
        """Starting a run may become a task; nothing must."""
        return "optional" if tool in self._tools else "never"

    async def task_of(self, tool: str, result: CallToolResult) -> Task | None:
        """The task of the run that the tool started: its record was on the disk before the tool answered."""
        content = result.structured_content
        return await self.get(content["run_id"]) if isinstance(content, dict) and "run_id" in content else None

    async def get(self, task_id: str) -> Task:
        """The run's state as a task."""
        return await to_thread.run_sync(self._task, task_id)

    async def update(self, task_id: str, responses: Mapping[str, Any]) -> None:
        """A run never asks for input once it has started, so there is nothing to hand over."""
        await self.get(task_id)

    async def cancel(self, task_id: str, client: str) -> None:
        """A durable cancel request; nothing for a run that has ended. Raises MCPError where the server only reads."""
        await self.get(task_id)
        if self._read_only:
            raise MCPError(INVALID_REQUEST, "The server was started with --read-only: it cancels no run")
        call = partial(self._service.cancel, task_id)
        try:
            await to_thread.run_sync(self._audit.recorded, client, "tasks/cancel", {"run_id": task_id}, call)
        except RunError as error:
            if error.code != "run_not_active":
                raise

    def _task(self, task_id: str) -> Task:
        if task_id == LATEST:
            raise UnknownTask(task_id)
        try:
            status = self._service.status(task_id)
        except UnknownIdError:
            raise UnknownTask(task_id) from None
        active, task_status = status.state in ACTIVE_STATES, task_status_of(status)
        return Task(
            task_id=status.run_id,
            status=task_status,
            created_at=status.created_at,
            updated_at=status.updated_at,
            message=self._outgoing.text(status, unchanged_text) if active else f"{status.run_id}: {status.state}",
            poll_ms=poll_milliseconds(status) if active else None,
            result=self._result(status) if task_status == "completed" else None,
        )

    def _result(self, status: RunStatus) -> CallToolResult:
        snapshot = self._service.snapshot(status.run_id)
        return CallToolResult(
            content=[TextContent(type="text", text=self._outgoing.text(status, status_text))],
            structured_content=self._outgoing.values(snapshot),
            is_error=status.state != "succeeded",
        )


def task_status_of(status: RunStatus) -> TaskStatus:
    """What a run's state is called among tasks."""
    if status.state in ACTIVE_STATES:
        return "working"
    return "cancelled" if status.state == "cancelled" else "completed"


def poll_milliseconds(status: RunStatus) -> int:
    """When to ask again: a tenth of what is left, between one and ten seconds."""
    left = status.eta_s if status.eta_s is not None else 0.0
    return int(min(max(left * 100, MIN_POLL_MS), MAX_POLL_MS))
