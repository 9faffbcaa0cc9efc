"""One rank of a training phase, as a process of its own: `python -m opd_mcp.worker.teams.rank_process`, work on stdin.

It runs the phase's stage as the worker would. What it reports and asks goes to the worker, which alone writes the
journal; errors go there from every rank.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from opd_mcp.engine.context import Context, RankPlace, Reporter
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.worker.log import logging_to_stderr
from opd_mcp.worker.teams import far_ranks
from opd_mcp.worker.teams.ranks import DONE, FAILED, described, raised

logger = logging.getLogger("opd_mcp.worker.teams.rank_process")  # this module is run, so its name is another
PR_SET_PDEATHSIG = 1
# what collective operations say when another rank is gone, or does not come
GROUP_TEXTS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "imed out waiting", "Socket Timeout")
GROUP_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")


class Channel:
    """The line to the worker; safe to share between threads."""

    def __init__(self, line: socket.socket) -> None:
        self._line, self._answers = line, line.makefile("rb")
        self._lock = threading.Lock()

    def tell(self, call: str, *given: Any) -> None:
        """Say something that needs no answer."""
        with self._lock:
            self._send(call, given, wait=False)

    def ask(self, call: str, *given: Any) -> Any:
        """The worker's answer; raises what it raised there."""
        with self._lock:
            self._send(call, given, wait=True)
            line = self._answers.readline()
        if not line:
            os._exit(1)  # no worker, no rank
        answer = json.loads(line)
        if "error" in answer:
            raise raised(answer["error"])
        return answer["value"]

    def _send(self, call: str, given: tuple[Any, ...], *, wait: bool) -> None:
        try:
            self._line.sendall(json.dumps({"call": call, "given": given, "wait": wait}).encode() + b"\n")
        except OSError:
            os._exit(1)


class ChannelReporter(Reporter):
    """Rank 0's reporter: the worker's own, at the other end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def phase(self, name: str) -> None:
        """As the worker's."""
        self._channel.tell("phase", name)

    def progress(self, done: int, total: int, unit: str) -> None:
        """As the worker's."""
        self._channel.tell("progress", done, total, unit)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """As the worker's."""
        self._channel.tell("metric", step, dict(values))

    def alert(self, code: str, message: str) -> None:
        """As the worker's."""
        self._channel.tell("alert", code, message)

    def resumed(self, step: int) -> None:
        """As the worker's."""
        self._channel.tell("resumed", step)

    def position(self) -> int:
        """As the worker's."""
        return int(self._channel.ask("position"))

    def should_stop(self) -> bool:
        """As the worker's."""
        return bool(self._channel.ask("should_stop"))


def end_with(worker: int) -> None:
    """See to it that this process is killed when the worker ends (Linux); a worker that is gone ends it at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != worker:
        os._exit(1)


def line_of(facts: Mapping[str, Any]) -> socket.socket:
    """The line to the worker, with which this process ends."""
    if "gate" not in facts:
        end_with(facts["worker"])
        return socket.socket(fileno=facts["channel"])
    far_ranks.show_own_device(facts["device_number"])
    line = far_ranks.come_in(facts["gate"])
    far_ranks.end_with(line)
    return line


def is_group_failure(error: BaseException) -> bool:
    """Whether a collective operation failed, which another rank's end causes."""
    named = type(error).__name__ in GROUP_ERRORS
    return named or (isinstance(error, RuntimeError | TimeoutError) and any(text in str(error) for text in GROUP_TEXTS))


def context_of(facts: Mapping[str, Any], record: RunRecord, channel: Channel) -> Context:
    """The stage's context in this rank."""
    place, recipe = facts["place"], record.request.recipe
    own: dict[str, Any] = {}
    if place["rank"] == 0:
        own = {"reporter": ChannelReporter(channel), "check_fence": lambda: channel.ask("check_fence")}
    return Context(
        runtime=recipe.runtime,
        prompting=recipe.prompting,
        checkpoint=recipe.checkpoint,
        made_here=lambda directory: bool(channel.ask("made_here", str(directory))),
        rendered_at=datetime.fromisoformat(record.created_at),
        ranks=RankPlace(**{**place, "folder": Path(place["folder"])}),
        **own,
    )


def main() -> None:
    """Do this rank's part of the work that stdin describes; the exit status is 0 if it is done."""
    facts = json.loads(sys.stdin.buffer.read())
    channel = Channel(line_of(facts))
    from opd_mcp.worker.main import engine_stages
    from opd_mcp.worker.stage_calls import StageCalls

    record = RunRecord.from_json(json.dumps(facts["record"]))
    calls = StageCalls(record, Path(facts["directory"]), context_of(facts, record, channel), engine_stages)
    calls.paths = {role: Path(path) for role, path in facts["paths"].items()}  # what earlier phases made among them
    status = 1
    with logging_to_stderr():
        try:
            summary = calls.trained(facts["phase"], Path(facts["output"]), facts["round"])
            if facts["place"]["rank"] == 0:
                channel.tell(DONE, summary.to_json())
            status = 0
        except BaseException as error:  # of any kind: the worker alone can tell of it
            group = is_group_failure(error)
            if not group and not isinstance(error, OpdError):
                logger.error("Rank %d failed", facts["place"]["rank"], exc_info=error)
            channel.tell(FAILED, described(error, group=group))
    sys.stdout.flush()
    sys.stderr.flush()
    # no torn-down process group or thread may keep a rank whose part is done
    os._exit(status)


if __name__ == "__main__":
    main()
