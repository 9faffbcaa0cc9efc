"""A client for scripts: start a run, watch it and return its result, in one awaited call.

    async with TasksClient(server) as client:      # a URL, StdioServerParameters or an MCPServer
        result = await client.run("start_distillation", {"plan_id": plan_id}, on_progress=print)

It asks for tasks (`io.modelcontextprotocol/tasks`). A server or protocol version without them answers with a run id,
and the same call then follows that run with `get_run_status`; the result is the same.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import anyio
from mcp import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp_types import CallToolResult, Request, RequestParams, Result
from pydantic import ConfigDict, Field

EXTENSION = "io.modelcontextprotocol/tasks"
DEFAULT_POLL_MS = 1_000
WAIT_SECONDS = 25
ENDED_TASKS = frozenset({"completed", "failed", "cancelled"})
ACTIVE_RUNS = frozenset({"queued", "running"})

OnProgress = Callable[[str], None]
"""Is told where the work stands whenever that has changed."""


class TaskCancelled(Exception):
    """The task was cancelled; its id is the only argument."""


class TaskFailed(Exception):
    """The task ended with an error of the protocol, which is the only argument."""


class TaskState(Result):
    """A task as the server shows it."""

    model_config = ConfigDict(extra="allow")

    task_id: str = Field(alias="taskId")
    status: Literal["working", "input_required", "completed", "failed", "cancelled"]
    status_message: str | None = Field(None, alias="statusMessage")
    created_at: str = Field(alias="createdAt")
    last_updated_at: str = Field(alias="lastUpdatedAt")
    ttl_ms: int | None = Field(None, alias="ttlMs")
    poll_interval_ms: int | None = Field(None, alias="pollIntervalMs")
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class CreatedTask(TaskState):
    """The answer of a tool call that became a task."""

    result_type: Literal["task"] = Field("task", alias="resultType")


class _TaskParams(RequestParams):
    task_id: str = Field(alias="taskId")


class _UpdateParams(_TaskParams):
    input_responses: dict[str, Any] = Field(alias="inputResponses")


class _Get(Request[_TaskParams, Literal["tasks/get"]]):
    method: Literal["tasks/get"] = "tasks/get"
    params: _TaskParams
    name_param = "taskId"


class _Cancel(Request[_TaskParams, Literal["tasks/cancel"]]):
    method: Literal["tasks/cancel"] = "tasks/cancel"
    params: _TaskParams
    name_param = "taskId"


class _Update(Request[_UpdateParams, Literal["tasks/update"]]):
    method: Literal["tasks/update"] = "tasks/update"
    params: _UpdateParams
    name_param = "taskId"


class _Declared(ClientExtension):
    """Declares the extension; a call through the plain client is resolved by waiting for its task."""

    identifier = EXTENSION

    def claims(self) -> list[ResultClaim[Any]]:
        async def resolve(created: CreatedTask, context: ClaimContext) -> CallToolResult:
            return _outcome(await _ended(context.session, created, None))

        return [ResultClaim(result_type="task", model=CreatedTask, resolve=resolve)]


class TasksClient:
    """A connected client whose long calls are tasks; `client` is the SDK's, for everything else."""

    def __init__(self, server: Any, **options: Any) -> None:
        self.client = Client(server, extensions=[_Declared()], **options)

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.__aexit__(kind, error, trace)

    async def start(self, tool: str, arguments: dict[str, Any]) -> CreatedTask | CallToolResult:
        """The task that the call became, or its plain answer."""
        answer = await self.client.session.call_tool(tool, arguments, allow_claimed=True)
        return answer if isinstance(answer, CreatedTask | CallToolResult) else CallToolResult.model_validate(answer)

    async def get(self, task_id: str) -> TaskState:
        """The task now; MCPError -32602 for an unknown id."""
        return await _get(self.client.session, task_id)

    async def update(self, task_id: str, responses: dict[str, Any]) -> None:
        """Answer the task's input requests."""
        params = _UpdateParams(taskId=task_id, inputResponses=responses)
        await self.client.session.send_request(_Update(params=params), Result)

    async def cancel(self, task_id: str) -> None:
        """Ask the task to stop; asking twice, or too late, is no error."""
        await self.client.session.send_request(_Cancel(params=_TaskParams(taskId=task_id)), Result)

    async def wait(self, task_id: str, on_progress: OnProgress | None = None) -> CallToolResult:
        """The task's result; raises TaskCancelled or TaskFailed. A crashed run is a result with `is_error`."""
        return _outcome(await _ended(self.client.session, await self.get(task_id), on_progress))

    async def run(self, tool: str, arguments: dict[str, Any], on_progress: OnProgress | None = None) -> CallToolResult:
        """The final result of a call, however long it takes: as a task, or by following the run it started."""
        started = await self.start(tool, arguments)
        if isinstance(started, CreatedTask):
            return _outcome(await _ended(self.client.session, started, on_progress))
        run_id = (started.structured_content or {}).get("run_id")
        return started if started.is_error or run_id is None else await self._followed(run_id, on_progress)

    async def _followed(self, run_id: str, on_progress: OnProgress | None) -> CallToolResult:
        arguments = {"run_id": run_id, "wait_seconds": WAIT_SECONDS}
        while True:
            answer = await self.client.call_tool("get_run_status", arguments)
            content = answer.structured_content or {}
            if answer.is_error or content.get("state") not in ACTIVE_RUNS:
                failed = answer.is_error or content.get("state") in ("failed", "lost")
                if content.get("state") == "cancelled":
                    raise TaskCancelled(run_id)
                return answer.model_copy(update={"is_error": failed})
            if on_progress is not None:
                on_progress("\n".join(getattr(part, "text", "") for part in answer.content))


async def _get(session: Any, task_id: str) -> TaskState:
    state: TaskState = await session.send_request(_Get(params=_TaskParams(taskId=task_id)), TaskState)
    return state


async def _ended(session: Any, state: TaskState, on_progress: OnProgress | None) -> TaskState:
    told = None
    # A created task is an envelope without result, even where it has ended already.
    while state.status not in ENDED_TASKS or isinstance(state, CreatedTask):
        if on_progress is not None and state.status_message and state.status_message != told:
            told = state.status_message
            on_progress(told)
        if state.status not in ENDED_TASKS:
            await anyio.sleep((state.poll_interval_ms or DEFAULT_POLL_MS) / 1000)
        state = await _get(session, state.task_id)
    return state


def _outcome(state: TaskState) -> CallToolResult:
    if state.status == "cancelled":
        raise TaskCancelled(state.task_id)
    if state.status == "failed" or state.result is None:
        raise TaskFailed(state.error)
    return CallToolResult.model_validate(state.result)
