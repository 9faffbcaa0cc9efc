"""One JSON request to a teacher's server, tried again where that can help, without ever showing the key."""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any

from opd_mcp.identity.remote import checked_url
from opd_mcp.schemas.errors import ResourceError, RunError
from opd_mcp.schemas.next_action import resume_call

MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Patience:
    """How long to wait for one answer, and how often and with which pauses to ask again."""

    timeout_s: float = 120.0
    attempts: int = 8
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0


class Refusal(Exception):
    """The server understood and said no (4xx): asking again cannot help. `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class _Retry(Exception):
    """Something that may pass: a status, a broken connection, an answer cut short."""

    def __init__(self, why: str, pause_s: float | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s


@dataclass
class Server:
    """A server's address and key; requests may come from several threads, each keeps a connection of its own."""

    url: str
    key: str | None = field(default=None, repr=False)
    patience: Patience = Patience()
    should_stop: Callable[[], bool] = lambda: False
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.parts = checked_url(self.url)
        self._local = threading.local()
        self._open: list[HTTPConnection] = []

    def ask(self, method: str, path: str, body: Any = None, *, max_bytes: int = 1 << 24) -> Any:
        """The JSON of the answer.

        Raises Refusal for a 4xx, ResourceError `teacher_unreachable` when every attempt failed, RunError
        `run_cancelled` when asked to stop.
        """
        pause, why = self.patience.first_pause_s, ""
        for attempt in range(self.patience.attempts):
            if self.stopped.is_set() or self.should_stop():
                raise RunError(
                    "run_cancelled",
                    "The run was asked to stop.",
                    fix="Resume the run to go on.",
                    call=resume_call(),
                )
            try:
                return self._once(method, path, body, max_bytes)
            except _Retry as retry:
                why = str(retry)
                wait = pause * random.uniform(0.5, 1.0) if retry.pause_s is None else retry.pause_s
            if attempt + 1 < self.patience.attempts:
                self.stopped.wait(min(wait, self.patience.longest_pause_s))
            pause = min(2 * pause, self.patience.longest_pause_s)
        raise ResourceError(
            "teacher_unreachable",
            f"The teacher's server gave no usable answer in {self.patience.attempts} attempts; the last: {why}.",
            value=self.url,
            fix="See that the server is up and reachable, then resume the run: finished shards are kept.",
            call=resume_call(),
        )

    def close(self) -> None:
        """Close every connection."""
        self.stopped.set()
        for connection in self._open:
            connection.close()

    def _once(self, method: str, path: str, body: Any, max_bytes: int) -> Any:
        connection = self._connection()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, self.parts.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise _Retry("an answer that is too long")
            declared = response.getheader("Content-Length")
            if declared is not None and declared.isdigit() and int(declared) > len(content):
                raise _Retry("an answer cut short")
        except (OSError, HTTPException) as error:
            connection.close()
            raise _Retry(type(error).__name__) from error
        except _Retry:
            connection.close()
            raise
        if response.status == 429 or response.status >= 500:
            raise _Retry(f"HTTP {response.status}", _seconds(response.getheader("Retry-After")))
        if response.status != 200:
            raise Refusal(response.status, self._shown(content))
        try:
            return json.loads(content)
        except ValueError as error:
            raise _Retry("an answer that is not JSON") from error

    def _shown(self, content: bytes) -> str:
        text = content.decode(errors="replace")[:MAX_ERROR_CHARACTERS]
        return text.replace(self.key, "…") if self.key else text

    def _connection(self) -> HTTPConnection:
        if not hasattr(self._local, "connection"):
            kind = HTTPSConnection if self.parts.scheme == "https" else HTTPConnection
            assert self.parts.hostname is not None, "checked_url"
            made = kind(self.parts.hostname, self.parts.port, timeout=self.patience.timeout_s)
            self._local.connection = made
            self._open.append(made)
        connection: HTTPConnection = self._local.connection
        return connection


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None
