"""`get_run_status`: a bounded wait that never owns the run, and short answers to repeated polls."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio import to_thread
from mcp.server.mcpserver import Context

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import GetRunStatus
from opd_mcp.schemas.runs import ACTIVE_STATES, PhaseName, RunState, RunStatus
from opd_mcp.server.protocol.outgoing import Outgoing
from opd_mcp.server.render.runs import status_text, unchanged_text
from opd_mcp.service import JobService

MAX_WAIT_SECONDS = 25
# The way there and back counts too: no call may take longer than MAX_WAIT_SECONDS.
LONGEST_BLOCK_SECONDS = 24.5
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 2.0
# A phase that is over this soon is not worth a call of its own.
SETTLE_SECONDS = 0.5
REPEAT_SECONDS = 60.0
_MAX_TOLD = 512
StatusText = Callable[[RunStatus], str]


@dataclass(frozen=True)
class _News:
    """What a caller waits for."""

    state: RunState
    phase: PhaseName | None
    alerts: tuple[int, str]
    cancel_requested: str | None

    @classmethod
    def of(cls, status: RunStatus) -> "_News":
        # A status may hold the last alerts only, so their number alone can stand still.
        alerts = (len(status.alerts), status.alerts[-1].time if status.alerts else "")
        return cls(status.state, status.phase, alerts, status.cancel_requested)

    def ends_wait(self, before: "_News") -> bool:
        """A new phase, an alert or the end; leaving the queue or a cancel request alone is not worth a call."""
        return self.is_urgent(before) or self.phase != before.phase

    def is_urgent(self, before: "_News") -> bool:
        """An alert or the end."""
        return self.state not in ACTIVE_STATES or self.alerts != before.alerts


@dataclass(frozen=True)
class _Told:
    """What was last told about a run in full, and when."""

    news: _News
    at: float


class StatusCalls:
    """Answers `get_run_status`; remembers per session and run what was last told in full."""

    def __init__(self, service: JobService, outgoing: Outgoing) -> None:
        self._service = service
        self._outgoing = outgoing
        self._told: OrderedDict[tuple[str | None, str], _Told] = OrderedDict()

    async def answer(self, request: GetRunStatus, context: Context) -> tuple[RunStatus, StatusText]:
        """The run's status and what words it, at once or after a wait.

        Raises ArgumentError `wait_too_long`, and UnknownIdError `unknown_run`.
        """
        if request.wait_seconds > MAX_WAIT_SECONDS:
            raise ArgumentError(
                "wait_too_long",
                f"One call waits at most {MAX_WAIT_SECONDS} s.",
                value=request.wait_seconds,
                fix=f"Use wait_seconds={MAX_WAIT_SECONDS} and call again; the run goes on by itself.",
            )
        status = await to_thread.run_sync(self._service.status, request.run_id)
        key = (_session(context), status.run_id)
        if request.wait_seconds == 0 or status.state not in ACTIVE_STATES:
            return self._told_answer(key, status)
        told = self._told.get(key)
        before = told.news if told else _News.of(status)
        status = await self._awaited(status, before, request.wait_seconds, context)
        if not _News.of(status).ends_wait(before):
            why = f"Still {status.state}; do not restart it."
            if status.cancel_requested is not None:
                why += f" {status.next_action.why}"
            status = status.model_copy(update={"next_action": status.next_action.with_why(why)})
        return self._told_answer(key, status)

    async def _awaited(self, status: RunStatus, before: _News, seconds: float, context: Context) -> RunStatus:
        """The status as soon as it differs enough from `before`, or when the time is over."""
        run_id, token = status.run_id, ""
        start = anyio.current_time()
        end, next_progress = start + min(seconds, LONGEST_BLOCK_SECONDS), start
        while (now := anyio.current_time()) < end:
            if token != (token := await to_thread.run_sync(self._service.wait_token, run_id)):
                status = await to_thread.run_sync(self._service.status, run_id)
                news = _News.of(status)
                if news.is_urgent(before):
                    return status
                if news.ends_wait(before):
                    end = min(end, now + SETTLE_SECONDS)
            if now >= next_progress:
                next_progress += PROGRESS_SECONDS
                status = await to_thread.run_sync(self._service.status, run_id)
                await context.report_progress(now - start, seconds, self._outgoing.text(status, unchanged_text))
            await anyio.sleep(min(POLL_SECONDS, max(end - anyio.current_time(), 0)))
        return await to_thread.run_sync(self._service.status, run_id)

    def _told_answer(self, key: tuple[str | None, str], status: RunStatus) -> tuple[RunStatus, StatusText]:
        """In full when there is news (or, for an ended run, when the last full answer is a minute old)."""
        news, told = _News.of(status), self._told.get(key)
        recent = told is not None and time.monotonic() - told.at < REPEAT_SECONDS
        # Requests without a session come from many clients: what one was told is news to another.
        known = key[0] is not None and told is not None and told.news == news
        if known and (status.state in ACTIVE_STATES or recent):
            status = status.model_copy(update={"unchanged": True})
            return status, unchanged_text
        self._told[key] = _Told(news, time.monotonic())
        self._told.move_to_end(key)
        while len(self._told) > _MAX_TOLD:
            self._told.popitem(last=False)
        return status, status_text


def _session(context: Context) -> str | None:
    """The HTTP session; empty over stdio, which has one client, and None for HTTP requests without a session."""
    headers = context.headers
    return "" if headers is None else headers.get("mcp-session-id")
