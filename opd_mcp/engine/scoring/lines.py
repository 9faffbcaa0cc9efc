"""Connections to one server, or to several that serve the same model side by side.

A row takes the next free line, so a server that is faster serves more of them. With several servers, one that does not
answer loses its lines until it has shown again who it is, and its rows go to the others. A server that holds requests
without an answer is found by asking for its health meanwhile. An engine whose metrics tell how many requests wait is
sent fewer while they are many.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from opd_mcp.engine.scoring.connection import Patience, Refusal, Server
from opd_mcp.schemas.errors import OpdError, ResourceError

Answer = TypeVar("Answer")
LOOK_SECONDS = 5.0
HEALTH = Patience(timeout_s=10.0, total_s=10.0, attempts=1, proven_s=0.0)
MISSED_LOOKS = 3
RETURN_SECONDS = 600.0
NO_QUEUE = "metrics without a queue"
METRICS_PATH = "/metrics"
# vllm/v1/metrics/loggers.py and SGLang's production metrics: one line per engine core, in Prometheus' text format;
# SGLang counts again by priority (sglang/srt/observability/metrics_collector.py)
WAITING = re.compile(
    rb"^(?:vllm:num_requests_waiting|sglang:num_queue_reqs)"
    rb'(?:\{(?![^}\n]*\bpriority="[^"])[^}\n]*\})? ([0-9.eE+]+)\s*$',
    re.MULTILINE,
)
FAILED = "_failed"  # what a managed engine's error ends with once it is not started again


def one_of_several(patience: Patience) -> Patience:
    """How one of several servers is asked: a row that it does not answer soon is another's."""
    return replace(patience, attempts=4, first_pause_s=0.2, proven_s=0.0, busy_s=patience.proven_s)


@dataclass
class Line:
    """A connection to a server; `proven` is the number of the one over which the model last showed who it is."""

    server: Server
    proven: int = 0


class Lines:
    """The free lines of all servers; `prove` shows over a line that its server still is who it was.

    `told` is called with a sentence when a server is lost and when it is back. When all are lost, they are waited for
    so long as one of them may be starting again.
    """

    def __init__(
        self, lines: Sequence[Line], prove: Callable[[Line], None], told: Callable[[str], None] = lambda text: None
    ) -> None:
        self.all, self.prove, self.told = list(lines), prove, told
        # The last one used is the next one used, so that idle ones stay closed.
        self._free = list(reversed(self.all))
        self._away: dict[str, float] = {}  # since when
        self._gone: set[str] = set()  # of those, the ones that are not started again
        self._changed, self._over = threading.Condition(), threading.Event()
        self._failure: OpdError | None = None
        self._watcher: threading.Thread | None = None

    @property
    def urls(self) -> list[str]:
        """The servers' addresses."""
        return list(dict.fromkeys(line.server.url for line in self.all))

    def prove_all(self) -> None:
        """Let every server that answers show who it is; one of them must. For times without a request."""
        for line in self._firsts():
            if line.server.url in self._away:
                continue
            try:
                self.prove(line)
            except ResourceError as error:
                if not self._can_lose(error):
                    raise
                self._lose(line, error)
        if len(self._away) == len(self.urls):
            self.served(self.prove)

    def served(self, ask: Callable[[Line], Answer]) -> Answer:
        """What a line answers, and where its server is lost, what another server's line answers.

        The answer counts only with a proof over the connection that it came over. Raises what `ask` and `prove` raise;
        for servers that are lost the last one's ResourceError, after its patience.
        """
        while True:
            with self._line() as line:
                try:
                    answer = ask(line)
                    if line.proven != line.server.opened:
                        self.prove(line)
                except ResourceError as error:
                    if not self._can_lose(error):
                        raise
                    self._lose(line, error)
                else:
                    return answer

    def stop(self) -> None:
        """Let no request begin, and end those that wait."""
        self._over.set()
        for line in self.all:
            line.server.stopped.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Close every connection."""
        self.stop()
        for line in self.all:
            line.server.close()

    @contextmanager
    def _line(self) -> Iterator[Line]:
        line = self._taken()
        try:
            yield line
        finally:
            with self._changed:
                self._free.append(line)
                self._changed.notify_all()

    def _firsts(self) -> list[Line]:
        """One line of every server."""
        found: dict[str, Line] = {}
        for line in self.all:
            found.setdefault(line.server.url, line)
        return list(found.values())

    def _can_lose(self, error: ResourceError) -> bool:
        return len(self.urls) > 1 and error.code.endswith(("_unreachable", FAILED))

    def _taken(self) -> Line:
        with self._changed:
            self._watch()
            while True:
                if self._failure is not None:
                    raise self._failure
                for position in range(len(self._free) - 1, -1, -1):
                    if self._free[position].server.url not in self._away:
                        return self._free.pop(position)
                self._changed.wait(1.0)
                self.all[0].server.require_going(present=False)

    def _lose(self, line: Line, error: ResourceError) -> None:
        with self._changed:
            line.server.absent.set()
            known = line.server.url in self._away
            self._away.setdefault(line.server.url, time.monotonic())
            if error.code.endswith(FAILED):
                self._gone.add(line.server.url)
                if len(self._gone) == len(self.urls):
                    self._fail(error)
        if not known:
            self.told(f"{line.server.url} gives no answer; its rows go to the other servers. {error.message}")

    def _watch(self) -> None:
        """Start to look after several servers, and the queues of engines, once."""
        if self._watcher is None and (len(self.urls) > 1 or self.all[0].server.access.role == "engine"):
            self._watcher = threading.Thread(target=self._looks, name="server looks", daemon=True)
            self._watcher.start()

    def _looks(self) -> None:
        missed = dict.fromkeys(self.urls, 0)
        probes = {line.server: Line(line.server.asked_with(HEALTH)) for line in self._firsts()}
        telling = {server for server in probes if server.access.role == "engine"}
        while not self._over.wait(LOOK_SECONDS):
            for server, probe in probes.items():
                if server.url in self._away:
                    self._return(server, probe)
                    continue
                up = len(probes) == 1 or _is_up(probe.server)
                if up and server in telling:
                    self._read_queue(server, probe, telling)
                missed[server.url] = 0 if up else missed[server.url] + 1
                if missed[server.url] >= MISSED_LOOKS:
                    missed[server.url] = 0
                    server.absent.set()  # whoever waits for it learns that within a second
        for probe in probes.values():
            probe.server.close()

    def _read_queue(self, server: Server, probe: Line, telling: set[Server]) -> None:
        """Let a server be sent what it works on; one without such metrics is not asked for them again."""
        try:
            server.flow.was_queued(probe.server.ask("GET", METRICS_PATH, read=waiting_requests))
        except Refusal:
            telling.discard(server)
        except OpdError as error:
            if NO_QUEUE in error.message:
                telling.discard(server)  # else it is away or busy, and whoever asks it for rows sees to that

    def _return(self, server: Server, probe: Line) -> None:
        """Give a server its lines back if it answers as the one that it was; else note when there is none any more."""
        try:
            self.prove(probe)
        except ResourceError as error:
            with self._changed:
                last = max(self._away.values())
                if len(self._away) == len(self.urls) and time.monotonic() - last > RETURN_SECONDS:
                    self._fail(error)
        except OpdError as error:  # another model is there now, or the run was stopped
            with self._changed:
                self._fail(error)
        else:
            with self._changed:
                server.absent.clear()
                del self._away[server.url]
                self._changed.notify_all()
            self.told(f"{server.url} answers again.")

    def _fail(self, error: OpdError) -> None:
        self._failure = error
        self._changed.notify_all()


def waiting_requests(metrics: bytes) -> int:
    """How many requests wait for all cores of an engine; raises ValueError where its metrics do not say it."""
    found = WAITING.findall(metrics)
    if not found:
        raise ValueError(NO_QUEUE)
    return int(sum(map(float, found)))


def _is_up(probe: Server) -> bool:
    try:
        probe.ask("GET", "/v1/models")
    except ResourceError:
        return False
    except (Refusal, OpdError):
        return True
    return True
