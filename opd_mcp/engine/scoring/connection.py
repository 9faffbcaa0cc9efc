"""One JSON request to a teacher's server, repeated where that can help, without ever showing the key."""

import json
import logging
import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from opd_mcp.engine.context import run_cancelled
from opd_mcp.identity.remote import checked_url
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import resume_call

MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Patience:
    """How long to wait for one answer, and how often and with which pauses to ask again."""

    timeout_s: float = 120.0
    attempts: int = 8
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0


@dataclass(frozen=True)
class Access:
    """The key to a server, how patiently it is asked, and whether to stop asking."""

    key: str | None = field(default=None, repr=False)
    patience: Patience = Patience()
    should_stop: Callable[[], bool] = lambda: False


class Refusal(Exception):
    """The server understood and said no (4xx, or a redirect): asking again cannot help. `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class _Retry(Exception):
    """Something that may pass: a status, a broken connection, an answer cut short."""

    def __init__(self, why: str, pause_s: float | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class Server:
    """A server's address and one connection to it, opened again when it is lost, for one thread at a time.

    `opened` counts the connections: who answers over a new one may be another server.
    """

    def __init__(self, url: str, access: Access | None = None, stopped: threading.Event | None = None) -> None:
        self.url, self.access, self.stopped = url, access or Access(), stopped or threading.Event()
        self.opened = 0

    @cached_property
    def _client(self) -> Any:
        return _client(self.url, self.access)

    def another(self) -> "Server":
        """Another connection to the same server; `close` of either ends the requests of both."""
        return Server(self.url, self.access, self.stopped)

    def ask(self, method: str, path: str, body: Any = None, *, max_bytes: int = 1 << 24) -> Any:
        """The JSON of the answer.

        Raises Refusal for a 3xx or 4xx, ResourceError `teacher_unreachable` when every attempt failed, RunError
        `run_cancelled` when asked to stop.
        """
        patience = self.access.patience
        pause, why = patience.first_pause_s, ""
        for attempt in range(patience.attempts):
            if self.stopped.is_set() or self.access.should_stop():
                raise run_cancelled()
            try:
                return self._once(method, path, body, max_bytes)
            except _Retry as retry:
                why = str(retry)
                wait = pause * random.uniform(0.5, 1.0) if retry.pause_s is None else retry.pause_s
            if attempt + 1 < patience.attempts:
                self.stopped.wait(min(wait, patience.longest_pause_s))
            pause = min(2 * pause, patience.longest_pause_s)
        raise ResourceError(
            "teacher_unreachable",
            f"The teacher's server gave no usable answer in {patience.attempts} attempts; the last: {why}.",
            value=self.url,
            fix="See that the server is up and reachable, then resume the run: finished shards are kept.",
            call=resume_call(),
        )

    def close(self) -> None:
        """Close the connection, and let no request begin over the others."""
        self.stopped.set()
        if "_client" in vars(self):
            self._client.close()

    def _once(self, method: str, path: str, body: Any, max_bytes: int) -> Any:
        import httpx2

        content = b""
        try:
            with self._client.stream(method, path, json=body, extensions={"trace": self._trace}) as response:
                for part in response.iter_raw():
                    content += part
                    if len(content) > max_bytes:
                        raise _Retry("an answer that is too long")
        except (httpx2.TransportError, OSError) as error:
            raise _Retry(type(error).__name__) from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _Retry(f"HTTP {response.status_code}", _seconds(response.headers.get("Retry-After")))
        if response.status_code != 200:
            raise Refusal(response.status_code, self._shown(content))
        try:
            return json.loads(content)
        except ValueError as error:
            raise _Retry("an answer that is not JSON") from error

    def _trace(self, event: str, info: Any) -> None:
        self.opened += event == "connection.connect_tcp.complete"

    def _shown(self, content: bytes) -> str:
        text = content.decode(errors="replace")[:MAX_ERROR_CHARACTERS]
        return text.replace(self.access.key, "…") if self.access.key else text


def _client(url: str, access: Access) -> Any:
    """Connections to the checked address alone: no redirects, no proxies or credentials from the environment."""
    address = checked_url(url)
    try:
        import httpx2
    except ModuleNotFoundError as error:
        raise ResourceError(
            "missing_package",
            "A remote teacher needs the package httpx2, which is not installed.",
            value="httpx2",
            fix="Install opd-mcp with its dependencies: pip install opd-mcp.",
        ) from error
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log a line for every request
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if access.key:
        headers["Authorization"] = f"Bearer {access.key}"
    return httpx2.Client(
        base_url=httpx2.URL(scheme=address.scheme, host=address.hostname, port=address.port, path=address.path or "/"),
        headers=headers,
        timeout=access.patience.timeout_s,
        limits=httpx2.Limits(max_connections=1),
        follow_redirects=False,
        trust_env=False,
        verify=ssl.create_default_context() if address.scheme == "https" else False,
    )


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None
