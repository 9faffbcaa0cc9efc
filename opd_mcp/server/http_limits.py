"""What one server takes from HTTP clients: connections, time and lines in the log; and the server with these limits.

A connection that keeps the server waiting (for the rest of a request, or for its next one) ends at a deadline, and
makes room when there are too many. One that the server owes an answer stays.
"""

import asyncio
import logging
import resource
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 32 << 10
LOG_LINES = 30
LOG_SECONDS = 60.0
# What a peer can cause without a token is logged under these names.
BOUNDED_LOGGERS = ("uvicorn", "asyncio", "mcp", "starlette")
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
Waiting = Literal["headers", "body"]


def connection_limit() -> int:
    """Connections at a time: half of what this process may open, so that runs can be started and files read."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if files == resource.RLIM_INFINITY else min(512, max(8, (files - 64) // 2))


@dataclass(frozen=True)
class Limits:
    """Connections at a time; seconds for a request's headers, its body, and an answer that is not taken."""

    connections: int = field(default_factory=connection_limit)
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: int = 5


class LogBudget(logging.Filter):
    """Lets through so many records per minute of what peers can cause, and says how many it left out."""

    def __init__(self) -> None:
        super().__init__()
        self._start, self._lines, self._left_out = time.monotonic(), 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if not record.name.startswith(BOUNDED_LOGGERS):
            return True
        now = time.monotonic()
        if now - self._start > LOG_SECONDS:
            if self._left_out:
                record.msg, record.args = f"{record.getMessage()} ({self._left_out} messages were left out)", ()
            self._start, self._lines, self._left_out = now, 0, 0
        self._lines += 1
        self._left_out += self._lines > LOG_LINES
        return self._lines <= LOG_LINES


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for one server, with the limits."""

    class Limited(H11Protocol):
        waiting: Waiting | None = None
        deadline: asyncio.TimerHandle | None = None
        stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            open_connections[self] = None
            if len(open_connections) > limits.connections:
                idle = next((other for other in open_connections if other is not self and other.waiting), None)
                if idle is None:
                    self._end(BUSY)
                    return
                idle._end()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_for(None)
            self._clear_stall()
            open_connections.pop(self, None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self in open_connections:
                super().data_received(data)
                self._watch()

        def on_response_complete(self) -> None:
            if self in open_connections:
                open_connections[self] = open_connections.pop(self)
            super().on_response_complete()
            self._watch()

        def send_400_response(self, msg: str) -> None:
            # An answer may be on its way: a second one in the middle of it cannot be written.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stalled = self.loop.call_later(limits.write_seconds, self._end)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._clear_stall()

        def _clear_stall(self) -> None:
            if self.stalled is not None:
                self.stalled.cancel()
                self.stalled = None

        def _watch(self) -> None:
            """Set the deadline of what this connection keeps the server waiting for."""
            state = self.conn.their_state
            kinds: dict[Any, Waiting] = {h11.IDLE: "headers", h11.SEND_BODY: "body"}
            self._wait_for(None if self.transport.is_closing() else kinds.get(state))

        def _wait_for(self, waiting: Waiting | None) -> None:
            if waiting == self.waiting:
                return
            self.waiting = waiting
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None
            if waiting is not None:
                seconds = limits.header_seconds if waiting == "headers" else limits.body_seconds
                self.deadline = self.loop.call_later(seconds, self._end, TOO_SLOW)

        def _end(self, answer: bytes = b"") -> None:
            """End the connection, with an answer where none has begun; what the peer has not taken is dropped."""
            open_connections.pop(self, None)
            unanswered = self.cycle is None or self.waiting == "headers" or not self.cycle.response_started
            if answer and unanswered and not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()
                self.loop.call_later(1.0, self.transport.abort)  # a peer that reads nothing is not waited for
            else:
                self.transport.abort()

    open_connections: dict[Limited, None] = {}  # the one that was answered longest ago comes first
    return Limited


def http_server(app: ASGIApp, host: str, port: int, limits: Limits | None = None) -> uvicorn.Server:
    """The server of an application, which `run()` serves until SIGINT or SIGTERM."""
    limits = limits or Limits()
    budget = LogBudget()
    for handler in logging.getLogger().handlers:
        handler.addFilter(budget)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=limited_protocol(limits),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # asyncio accepts as many at a time, several times before the first of them is counted.
        backlog=max(4, min(64, limits.connections // 4)),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)
