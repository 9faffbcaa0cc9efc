"""Runs as tasks: the task's id is the run's id, its state is on the disk, so any server of the workspace serves it.

`failed` is for errors of the protocol only: a run that failed or was lost is `completed` with `isError`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from anyio import to_thread
from mcp_types import CallToolResult, TextContent

from opd_mcp.jobs.service import LATEST, JobService
from opd_mcp.schemas.errors import RunError, UnknownIdError
from opd_mcp.schemas.redaction import redacted, redacted_values
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.server.answers import structured
from opd_mcp.server.tasks import Task, TaskStatus, TaskSupport, UnknownTask
from opd_mcp.server.texts import status_text, unchanged_text

MIN_POLL_MS = 1_000
MAX_POLL_MS = 10_000


class RunTasks:
    """The backend of the tasks extension over a JobService; `tools` are those that start a run.

    No task holds one of the secrets.
    """

    def __init__(self, service: JobService, tools: frozenset[str], secrets: Sequence[str] = ()) -> None:
        self._service = service
        self._tools = tools
        self._secrets = secrets

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

    async def cancel(self, task_id: str) -> None:
        """A durable cancel request; nothing for a run that has ended."""
        await self.get(task_id)
        try:
            await to_thread.run_sync(self._service.cancel, task_id)
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
            message=redacted(unchanged_text(status), self._secrets) if active else f"{status.run_id}: {status.state}",
            poll_ms=poll_milliseconds(status) if active else None,
            result=self._result(status) if task_status == "completed" else None,
        )

    def _result(self, status: RunStatus) -> CallToolResult:
        snapshot = self._service.snapshot(status.run_id)
        return CallToolResult(
            content=[TextContent(type="text", text=redacted(status_text(status), self._secrets))],
            structured_content=redacted_values(structured(snapshot), self._secrets),
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
