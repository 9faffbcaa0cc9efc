"""A server with the tools that the conformance suite's `tasks-*` scenarios call, and our tasks extension over them.

Run: `python tasks_fixture.py PORT`. For tests only: the work is asyncio tasks in memory. What is tested is
`opd_mcp.server.protocol.tasks.TasksExtension`; the backend here only makes work for it.
"""

import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult, ElicitRequest, ElicitRequestFormParams, InputRequiredResult, TextContent

from opd_mcp.server.protocol.tasks import Task, TasksExtension, TaskSupport, UnknownTask, declares_tasks

SUPPORT: dict[str, TaskSupport] = {
    "greet": "never",
    "slow_compute": "optional",
    "confirm_delete": "optional",
    "multi_input": "optional",
    "protocol_error_job": "optional",
    "failing_job": "required",
    "test_tool_with_task": "required",
}
Work = Callable[["Job"], Awaitable[CallToolResult]]


def text(message: str, *, error: bool = False, **content: Any) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text=message)], structured_content=content or None, is_error=error
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def question(message: str) -> ElicitRequest:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "confirm": {"type": "boolean"}}}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


@dataclass
class Job:
    """One piece of work: its task, what it waits for, and the way to stop it."""

    task: Task
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    answers: dict[str, Any] = field(default_factory=dict)
    answered: anyio.Event = field(default_factory=anyio.Event)

    def become(self, **changes: Any) -> None:
        self.task = replace(self.task, updated_at=now(), **changes)

    async def ask(self, *messages: str) -> dict[str, Any]:
        requests = {
            uuid.uuid4().hex: question(message).model_dump(by_alias=True, mode="json", exclude_none=True)
            for message in messages
        }
        self.become(status="input_required", input_requests=requests)
        await self.answered.wait()
        self.become(status="working", input_requests=None)
        return self.answers


class Jobs:
    """The backend."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.jobs: dict[str, Job] = {}
        self._tasks = tasks

    async def run(self, context: Context, work: Work) -> CallToolResult:
        """The work's result, or for a client with tasks the id under which the extension finds its job."""
        created = now()
        job = Job(Task(uuid.uuid4().hex, "working", created, created, poll_ms=200, ttl_ms=600_000))
        if not declares_tasks(context.request_context):
            return await work(job)
        self.jobs[job.task.task_id] = job
        self._tasks.start_soon(self._do, job, work)
        return text("started", task_id=job.task.task_id)

    async def _do(self, job: Job, work: Work) -> None:
        with job.scope:
            try:
                result = await work(job)
                job.become(status="completed", result=result)
            except ZeroDivisionError:
                job.become(status="failed", error={"code": -32603, "message": "Internal error"})
        if job.scope.cancelled_caught:
            job.become(status="cancelled", input_requests=None)

    def support(self, tool: str) -> TaskSupport:
        return SUPPORT.get(tool, "never")

    async def task_of(self, tool: str, result: CallToolResult) -> Task | None:
        content = result.structured_content
        return self.jobs[content["task_id"]].task if isinstance(content, dict) and "task_id" in content else None

    async def get(self, task_id: str) -> Task:
        if task_id not in self.jobs:
            raise UnknownTask(task_id)
        return self.jobs[task_id].task

    async def update(self, task_id: str, responses: Mapping[str, Any]) -> None:
        pending = dict((await self.get(task_id)).input_requests or {})
        job = self.jobs[task_id]
        for key in pending.keys() & responses.keys():
            job.answers[key] = responses[key]
            del pending[key]
        if job.task.status == "input_required":
            job.become(input_requests=pending)
            if not pending:
                job.answered.set()

    async def cancel(self, task_id: str, client: str) -> None:
        await self.get(task_id)
        self.jobs[task_id].scope.cancel()


def fixture_server(jobs: Jobs) -> MCPServer:
    """All tools that the scenarios name."""
    server = MCPServer("tasks-fixture", extensions=[TasksExtension(jobs)])

    @server.tool()
    async def greet(name: str) -> CallToolResult:
        return text(f"Hello, {name}!")

    @server.tool()
    async def slow_compute(context: Context, seconds: float = 1, label: str = "") -> CallToolResult:
        async def work(job: Job) -> CallToolResult:
            await anyio.sleep(seconds)
            return text(f"computed {label}")

        return await jobs.run(context, work)

    @server.tool()
    async def failing_job(context: Context) -> CallToolResult:
        async def work(job: Job) -> CallToolResult:
            await anyio.sleep(1)
            return text("it failed", error=True)

        return await jobs.run(context, work)

    @server.tool()
    async def protocol_error_job(context: Context) -> CallToolResult:
        async def work(job: Job) -> CallToolResult:
            await anyio.sleep(0.2)
            raise ZeroDivisionError

        return await jobs.run(context, work)

    @server.tool()
    async def confirm_delete(context: Context, filename: str = "") -> CallToolResult:
        async def work(job: Job) -> CallToolResult:
            await job.ask(f"Delete {filename}?")
            return text("deleted")

        return await jobs.run(context, work)

    @server.tool()
    async def multi_input(context: Context) -> CallToolResult:
        async def work(job: Job) -> CallToolResult:
            await job.ask("First?", "Second?")
            return text("both answered")

        return await jobs.run(context, work)

    @server.tool()
    async def test_tool_with_task(context: Context) -> CallToolResult | InputRequiredResult:
        answers = context.input_responses or {}
        if "user_name" not in answers:
            return InputRequiredResult(input_requests={"user_name": question("Your name?")}, request_state="asked")

        async def work(job: Job) -> CallToolResult:
            await anyio.sleep(0.2)
            return text(f"Hello, {answers['user_name'].content['name']}!")

        return await jobs.run(context, work)

    return server


async def main(port: int) -> None:
    import uvicorn

    async with anyio.create_task_group() as tasks:
        app = fixture_server(Jobs(tasks)).streamable_http_app(host="127.0.0.1")
        await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")).serve()
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]))
