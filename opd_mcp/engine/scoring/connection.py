"""One JSON request to a model's server, repeated where that can help, without ever showing the key."""

import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from opd_mcp.engine.context import run_cancelled
from opd_mcp.identity.remote import checked_url
from opd_mcp.schemas.errors import ResourceError
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.texts import escaped

MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Patience:
    """How long to wait for one answer, and how often and with which pauses to ask again.

    `timeout_s` is for each wait on the connection, `total_s` for the whole request: a server that sends a byte now and
    then would never exceed the first. A server that has once shown who it is is asked for `proven_s` at least: it may
    be starting again, which takes minutes. `busy_s`, where given, is instead for one that says that it is busy (429).
    """

    timeout_s: float = 120.0
    total_s: float = 300.0
    attempts: int = 8
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    proven_s: float = 600.0
    busy_s: float | None = None


@dataclass(frozen=True)
class Access:
    """The key to a server, how patiently it is asked, and whether to stop asking.

    `role` is who it is in messages and error codes. `resumes`: a failure ends a run, which can be resumed. `check`
    raises once the server is known not to come back.
    """

    key: str | None = field(default=None, repr=False)
    patience: Patience = Patience()
    should_stop: Callable[[], bool] = lambda: False
    role: Literal["teacher", "engine"] = "teacher"
    resumes: bool = True
    check: Callable[[], None] = lambda: None


class Refusal(Exception):
    """The server understood and said no (4xx, or a redirect): asking again cannot help. `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class _Retry(Exception):
    """Something that may pass: a status, a broken connection, an answer cut short."""

    def __init__(self, why: str, pause_s: float | None = None, *, busy: bool = False) -> None:
        super().__init__(why)
        self.pause_s, self.busy = pause_s, busy


# Of the requests sent one in so many may wait in the server's queue, so that it is never without one.
SPARE_SHARE = 8


class Flow:
    """How many requests a server is sent at a time: half as many once it says that it is busy, then one more after as
    many answers as are sent together (the rule of TCP's congestion control, RFC 5681).

    A server that tells how many requests wait in its queue is sent those that it works on, and a few for the queue.
    """

    def __init__(self) -> None:
        self.limit = float("inf")
        self._sent = self._begun = self._halved = 0
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, require_going: Callable[[], None]) -> Iterator[int]:
        """One request's time, once there is room for it; its number."""
        with self._changed:
            while self._sent + 1 > self.limit:
                require_going()
                self._changed.wait(LOOK_SECONDS)
            self._sent, self._begun = self._sent + 1, self._begun + 1
            number = self._begun
        try:
            yield number
        finally:
            with self._changed:
                self._sent -= 1
                self._changed.notify_all()

    def was_busy(self, number: int) -> None:
        """The server had no room for a request; those sent before the last halving say nothing new."""
        with self._changed:
            if number > self._halved:
                # Its own turn is over.
                self.limit, self._halved = max(min(self.limit, self._sent + 1) // 2, 1.0), self._begun

    def was_queued(self, waiting: int) -> None:
        """So many requests, ours or others', wait until the server begins with them."""
        with self._changed:
            spare = max(self._sent // SPARE_SHARE, 1)
            if waiting > spare:
                self.limit = max(float(self._sent - waiting + spare), 1.0)

    def was_answered(self) -> None:
        """The server answered a request."""
        with self._changed:
            self.limit += 1 / self.limit


class Server:
    """A server's address and one connection to it, opened again when it is lost, for one thread at a time.

    `opened` counts the connections: who answers over a new one may be another server. `known` is set once the server
    has shown who it is, `absent` while it does not answer when its health is asked for: requests to it end at once.
    """

    def __init__(self, url: str, access: Access | None = None, stopped: threading.Event | None = None) -> None:
        self.url, self.access = url, access or Access()
        self.stopped, self.known, self.absent = stopped or threading.Event(), threading.Event(), threading.Event()
        self.flow = Flow()
        self.opened = 0
        self._turn = _Turn(self.require_going)

    @cached_property
    def _client(self) -> Any:
        return _client(self.url, self.access, self._turn)

    def another(self) -> "Server":
        """Another connection to the same server; `close` of either ends the requests of both."""
        other = Server(self.url, self.access, self.stopped)
        other.known, other.absent, other.flow = self.known, self.absent, self.flow
        return other

    def asked_with(self, patience: Patience) -> "Server":
        """Another connection to the same server, asked with another patience, and also while it is absent or busy."""
        other = self.another()
        other.flow = Flow()
        other.access, other.absent = replace(self.access, patience=patience), threading.Event()
        return other

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        max_bytes: int = 1 << 24,
        read: Callable[[bytes], Any] = json.loads,
    ) -> Any:
        """The JSON of the answer, or what `read` makes of its bytes (ValueError: they are no answer).

        Raises Refusal for a 3xx or 4xx, ResourceError `teacher_unreachable` or `engine_unreachable` when every attempt
        failed, RunError `run_cancelled` when asked to stop.
        """
        patience, begun = self.access.patience, time.monotonic()
        pause, failures, busy = patience.first_pause_s, list[str](), False
        while True:
            self.require_going()
            try:
                return self._once(method, path, body, max_bytes, read)
            except _Retry as retry:
                failures.append(str(retry))
                busy = retry.busy
                wait = pause * random.uniform(0.5, 1.0) if retry.pause_s is None else retry.pause_s
            waited = time.monotonic() - begun
            longest = patience.busy_s if busy and patience.busy_s is not None else patience.proven_s
            returning = self.known.is_set() and waited < longest
            if len(failures) >= patience.attempts and not returning:
                raise self._unreachable(failures)
            self.stopped.wait(min(wait, patience.longest_pause_s))
            pause = min(2 * pause, patience.longest_pause_s)

    def _unreachable(self, failures: list[str]) -> ResourceError:
        role, resumes = self.access.role, self.access.resumes
        tries = f"{len(failures)} attempt{'s' * (len(failures) > 1)}"
        first = f"the first: {failures[0]}; " if failures[0] != failures[-1] else ""
        then = "then resume the run: finished shards are kept" if resumes else "then ask again: no file was changed"
        return ResourceError(
            f"{role}_unreachable",
            f"The {role}'s server gave no usable answer in {tries}; {first}the last: {failures[-1]}.",
            value=self.url,
            fix=f"See that the server is up and reachable, {then}.",
            call=resume_call() if resumes else None,
        )

    def close(self) -> None:
        """Close the connection, and let no request begin over the others."""
        self.stopped.set()
        if "_client" in vars(self):
            self._client.close()

    def require_going(self, *, present: bool = True) -> None:
        """Raise RunError `run_cancelled` when asked to stop; with `present` also where the server is known to be away.

        With `present` it raises what the access' `check` raises as well.
        """
        if self.stopped.is_set() or self.access.should_stop():
            raise run_cancelled()
        if not present:
            return
        self.access.check()
        if self.absent.is_set():
            raise self._unreachable(["no answer when asked for its health"])

    def _once(self, method: str, path: str, body: Any, max_bytes: int, read: Callable[[bytes], Any]) -> Any:
        import httpx2

        content, total = b"", self.access.patience.total_s
        try:
            with (
                self.flow.turn(self.require_going) as number,
                self._turn.within(total),
                self._client.stream(method, path, json=body, extensions={"trace": self._trace}) as response,
            ):
                for part in response.iter_raw():
                    content += part
                    if len(content) > max_bytes:
                        raise _Retry("an answer that is too long")
        except (httpx2.TransportError, OSError) as error:
            why = f"no whole answer within {total:g} s" if self._turn.is_over() else type(error).__name__
            raise _Retry(why) from error
        if response.status_code == 429 or response.status_code >= 500:
            busy, said = response.status_code == 429, self._shown(content)
            if busy:
                self.flow.was_busy(number)
            why = f"HTTP {response.status_code}" + (f": {said}" if said else "")
            raise _Retry(why, _seconds(response.headers.get("Retry-After")), busy=busy)
        self.flow.was_answered()
        if response.status_code != 200:
            raise Refusal(response.status_code, self._shown(content))
        try:
            return read(content)
        except ValueError as error:
            raise _Retry("an answer that is not JSON" if read is json.loads else str(error)) from error

    def _trace(self, event: str, info: Any) -> None:
        self.opened += event == "connection.connect_tcp.complete"

    def _shown(self, content: bytes) -> str:
        """The server's own words, on one line and without our key."""
        text = " ".join(_said(content.decode(errors="replace")).split())[:MAX_ERROR_CHARACTERS]
        return escaped(text.replace(self.access.key, "…") if self.access.key else text)


def _said(content: str) -> str:
    """The message in an error of the forms {error: {message}}, {message} and {error}; else all of the text."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content
    for name in ("error", "message"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else content


# How soon a waiting request notices that the run is to stop, in seconds.
LOOK_SECONDS = 1.0
WRITTEN_BYTES = 64 << 10
IDLE_SECONDS = 5.0


class _Turn:
    """The deadline of the request that a thread is making; every wait on a connection is cut into short ones."""

    def __init__(self, require_going: Callable[[], None]) -> None:
        self.require_going = require_going
        self._thread = threading.local()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Give this thread's request so many seconds in all."""
        self._thread.deadline = time.monotonic() + seconds
        yield

    def is_over(self) -> bool:
        """Whether this thread's request has used up its time."""
        return self.left() <= 0

    def left(self) -> float:
        """Seconds that this thread's request still has."""
        return float(getattr(self._thread, "deadline", float("inf"))) - time.monotonic()

    def wait(self, operation: Callable[[float], Any], timeout: float | None, expired: type[Exception]) -> Any:
        """The result of `operation(seconds)`, tried in short waits while it raises `expired`.

        Raises `expired` once `timeout` or the request's time is over, and RunError `run_cancelled` when asked to stop.
        """
        until = time.monotonic() + min(self.left(), float("inf") if timeout is None else timeout)
        while True:
            self.require_going()
            left = until - time.monotonic()
            if left <= 0:
                raise expired
            try:
                return operation(min(left, LOOK_SECONDS))
            except expired:
                continue


def _transport(context: Any, turn: _Turn) -> Any:
    """A transport whose connections obey the deadline of the request that uses them.

    A body is read by us, but status line and headers inside the library, which knows no deadline for all of a request.
    """
    import httpcore2
    import httpx2

    class Stream(httpcore2.NetworkStream):
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            read: bytes = turn.wait(lambda wait: self._inner.read(max_bytes, wait), timeout, httpcore2.ReadTimeout)
            return read

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(buffer), WRITTEN_BYTES):
                # An interrupted write cannot be repeated, so each is one wait.
                wait = turn.left() if timeout is None else min(turn.left(), timeout)
                if wait <= 0:
                    raise httpcore2.WriteTimeout
                self._inner.write(buffer[start : start + WRITTEN_BYTES], wait)

        def close(self) -> None:
            self._inner.close()

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            return Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

        def get_extra_info(self, info: str) -> Any:
            return self._inner.get_extra_info(info)

    class Backend(httpcore2.NetworkBackend):
        def connect_tcp(self, *given: Any, **named: Any) -> Any:
            return Stream(httpcore2.SyncBackend().connect_tcp(*given, **named))

    transport = httpx2.HTTPTransport(verify=context, trust_env=False)
    # The transport has no parameter for its pool's network backend.
    transport._pool = httpcore2.ConnectionPool(
        ssl_context=context or None, max_connections=1, keepalive_expiry=IDLE_SECONDS, network_backend=Backend()
    )
    return transport


def _client(url: str, access: Access, turn: _Turn) -> Any:
    """Connections to the checked address alone: no redirects, no proxies or credentials from the environment."""
    address = checked_url(url)
    try:
        import httpx2
    except ModuleNotFoundError as error:
        raise ResourceError(
            "missing_package",
            "A model's server needs the package httpx2, which is not installed.",
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
        follow_redirects=False,
        trust_env=False,
        transport=_transport(ssl.create_default_context() if address.scheme == "https" else False, turn),
    )


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None
