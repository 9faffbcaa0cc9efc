"""A training phase on several devices: the worker starts a process per device, hears them, and ends all when one ends.

    worker (no torch for this; run lock, leases, journal, publication)
      ├─ rank 0 ── its reports, and the errors of all: lines of JSON over a socket pair
      └─ rank 1 … N − 1: talk to their process group, and ask the worker only what a stage must know

Ranks end with the worker: by a signal of the kernel, and where it has none by the end of their socket. Nothing of
theirs must be ended gently, since checkpoints are whole files or none.
"""

import gc
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from opd_mcp.schemas.errors import OpdError, RunError
from opd_mcp.schemas.next_action import NextAction, resume_call
from opd_mcp.schemas.reports import TrainingSummary
from opd_mcp.worker.teams.far_ranks import FarRank, Gate, Start, by_srun, even_nodes

POLL_SECONDS = 0.05
# between the first rank that lost its group and the evidence of which one left it
GRACE_SECONDS = 0.5
GROUP_SECONDS = 600.0
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
READ_BYTES = 1 << 16
FAILED, DONE = "failed", "done"
COMMAND = (sys.executable, "-P", "-m", "opd_mcp.worker.teams.rank_process")

Answers = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class RankWork:
    """What the ranks compute: `facts` as `rank_process` reads them; `devices` a GPU's UUID, or None, per rank here.

    Those after them are `far`, on other machines of the same job.
    """

    facts: Mapping[str, Any]
    devices: Sequence[str | None]
    folder: Path
    group_seconds: float = GROUP_SECONDS
    command: Sequence[str] = COMMAND
    far: Sequence[FarRank] = ()
    start_far: Start = by_srun


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    host: str | None = None
    heard: bytes = b""
    failure: dict[str, Any] | None = None
    summary: TrainingSummary | None = None


@dataclass
class RankTeam:
    """The processes of one training phase; `answers` are what rank 0 may call, `questions` what any rank may."""

    work: RankWork
    answers: Answers
    questions: Answers
    ranks: list[_Rank] = field(default_factory=list)

    def trained(self) -> TrainingSummary:
        """What rank 0 says of the finished training.

        Raises what the stage raised in a rank, and RunError `rank_lost` when one ended, or left its group waiting.
        """
        give_back_memory()
        folder = self.work.folder / f"ranks-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        try:
            self._start(folder)
            return self._heard_out()
        finally:
            self._end()
            for rank in self.ranks:
                rank.channel.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, folder: Path) -> None:
        work, alone = self.work, not self.work.far
        for number, device in enumerate(work.devices):
            ours, theirs = socket.socketpair()
            with theirs:
                line = {"channel": theirs.fileno(), "worker": os.getpid()}
                process = subprocess.Popen(
                    work.command,
                    stdin=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    env=rank_environment(os.environ, device, alone=alone),
                )
            self.ranks.append(_Rank(number, process, ours))
            self._tell(self.ranks[-1], folder, line)
        if work.far:
            self._start_far(folder)

    def _start_far(self, folder: Path) -> None:
        """Start the ranks of other machines, and wait until they have come in; who does not is lost."""
        here = len(self.work.devices)
        with Gate([self.work.far[0].worker_host, socket.gethostname()]) as gate:
            for number, far in enumerate(self.work.far, here):
                process = subprocess.Popen(
                    self.work.start_far(far.host, self.work.command),
                    stdin=subprocess.PIPE,
                    env=rank_environment(os.environ, None, alone=False),
                )
                ours, theirs = socket.socketpair()  # until its own line is there: an end that says nothing
                self.ranks.append(_Rank(number, process, ours, far.host))
                theirs.close()
                self._tell(self.ranks[-1], folder, {"gate": gate.facts(number), "device_number": far.device_number})
            far_ranks = self.ranks[here:]
            lines = gate.admitted([rank.number for rank in far_ranks], self._one_has_ended, self.work.group_seconds)
        for rank in far_ranks:
            if rank.number in lines:
                rank.channel.close()
                rank.channel = lines[rank.number]
        for rank in far_ranks:
            if rank.number not in lines and not self._one_has_ended():
                raise self._lost(rank, f"did not come within {self.work.group_seconds:g} s")

    def _one_has_ended(self) -> bool:
        return any(rank.process.poll() is not None for rank in self.ranks)

    def _tell(self, rank: _Rank, folder: Path, line: Mapping[str, Any]) -> None:
        """Give a rank its work."""
        size, timeout = len(self.work.devices) + len(self.work.far), self.work.group_seconds
        nodes = even_nodes(len(self.work.devices), self.work.far)
        place = {"rank": rank.number, "size": size, "folder": str(folder), "timeout": timeout, "nodes": nodes}
        assert rank.process.stdin is not None, "a rank reads its work"
        with suppress(BrokenPipeError), rank.process.stdin:  # it is lost already, which is found later
            rank.process.stdin.write(json.dumps({**self.work.facts, "place": place, **line}).encode())

    def _heard_out(self) -> TrainingSummary:
        """The summary, once all have ended well."""
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                rank.channel.setblocking(False)
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while True:
                codes = [rank.process.poll() for rank in self.ranks]
                for key, _ in selector.select(0 if all(code is not None for code in codes) else POLL_SECONDS):
                    if not self._hear(key.data):
                        selector.unregister(key.data.channel)
                if any(code not in (None, 0) for code in codes) or any(rank.failure for rank in self.ranks):
                    raise self._failure()
                if all(code == 0 for code in codes) and not selector.get_map():
                    if self.ranks[0].summary is None:
                        raise self._lost(self.ranks[0], "ended without a result")
                    return self.ranks[0].summary

    def _hear(self, rank: _Rank) -> bool:
        """Answer what a rank has said so far; False once its channel has ended."""
        while True:
            try:
                data = rank.channel.recv(READ_BYTES)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            rank.heard += data
            *lines, rank.heard = rank.heard.split(b"\n")
            for line in lines:
                self._take(rank, json.loads(line))

    def _take(self, rank: _Rank, said: dict[str, Any]) -> None:
        name, given = said["call"], said["given"]
        if name == FAILED:
            rank.failure = given[0]
        elif name == DONE:
            rank.summary = TrainingSummary.from_json(given[0])
        else:
            known = self.answers if rank.number == 0 and name in self.answers else self.questions
            try:
                reply = {"value": known[name](*given)}
            except OpdError as error:
                if not said["wait"]:
                    raise
                reply = {"error": described(error)}
            if said["wait"]:
                rank.channel.setblocking(True)
                with suppress(BrokenPipeError, ConnectionResetError):  # it is lost, which is found above
                    rank.channel.sendall(json.dumps(reply).encode() + b"\n")
                rank.channel.setblocking(False)

    def _failure(self) -> Exception:
        """Why the training failed; in the end no rank lives, and all that they said has been heard."""
        begun = time.monotonic()
        while self._culprit() is None and time.monotonic() < begun + GRACE_SECONDS:
            time.sleep(POLL_SECONDS)
            for rank in self.ranks:
                self._hear(rank)
        culprit = self._culprit()
        silent = [rank for rank in self.ranks if rank.process.poll() is None and not rank.failure]
        halted = {rank.number: _is_halted(rank.process.pid) for rank in silent}
        self._end()
        for rank in self.ranks:
            self._hear(rank)
        if culprit is not None and culprit.failure is not None:
            return raised(culprit.failure)
        if culprit is not None:
            return self._lost(culprit, ending(culprit.process.returncode))
        seconds = f"did not answer the others within {self.work.group_seconds:g} s"
        for rank in silent:
            stopped = ": its process is suspended" if halted[rank.number] else ""
            return self._lost(rank, f"{seconds}{stopped}")
        first = next(rank for rank in self.ranks if rank.failure)
        assert first.failure is not None, "a failure is why this was called"
        return self._lost(first, f"lost the others ({first.failure['message']})")

    def _culprit(self) -> _Rank | None:
        """The rank that ended first by itself, so far as it is known."""
        for rank in self.ranks:
            if rank.failure is not None and not rank.failure["group"]:
                return rank
        return next(
            (rank for rank in self.ranks if rank.failure is None and rank.process.poll() not in (None, 0)), None
        )

    def _lost(self, rank: _Rank, how: str) -> RunError:
        where = f"process {rank.process.pid}" if rank.host is None else f"on {rank.host}"
        return RunError(
            "rank_lost",
            f"Rank {rank.number} of {len(self.ranks)} ({where}) {how}; the others were ended.",
            fix="Look at the end of the log, then resume the run: it continues from its last checkpoint.",
            call=resume_call(),
        )

    def _end(self) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()


def rank_environment(environment: Mapping[str, str], device: str | None, *, alone: bool = True) -> dict[str, str]:
    """A rank's environment: its one device, this package, and a group that only this machine can reach if it is alone.

    Between machines the group takes the network that the job's setup names, or the one that gloo and NCCL find.
    """
    package = str(Path(__file__).parents[3])
    loopback = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK} if alone else {}
    return {**environment, "CUDA_VISIBLE_DEVICES": device or "", "PYTHONPATH": package, **loopback}


def give_back_memory() -> None:
    """Return what earlier phases of this process hold of a GPU and no longer use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def described(error: BaseException, *, group: bool = False) -> dict[str, Any]:
    """An error as it crosses the channel; `group`: another rank's end caused it."""
    told: dict[str, Any] = {"kind": type(error).__name__, "message": str(error), "group": group}
    if isinstance(error, OpdError):
        call = None if error.call is None else error.call.to_dict()
        told |= {"code": error.code, "message": error.message, "value": error.value, "nearest": error.nearest}
        told |= {"fix": error.fix, "call": call}
    elif isinstance(error, OSError) and error.errno is not None:
        told |= {"errno": error.errno, "text": error.strerror or str(error)}
    return told


def raised(told: Mapping[str, Any]) -> Exception:
    """The error that `described` told, as far as a worker tells kinds apart."""
    if "code" in told:
        call = None if told["call"] is None else NextAction.model_validate(told["call"])
        given = {name: told[name] for name in ("value", "nearest", "fix")}
        return OpdError(told["code"], told["message"], call=call, **given)
    if "errno" in told:
        return OSError(told["errno"], told["text"])
    if told["kind"] in ("OutOfMemoryError", "MemoryError") or "allocate memory" in told["message"]:
        return MemoryError(told["message"])
    return RuntimeError(f"{told['kind']} in a rank: {told['message']}")


def ending(code: int) -> str:
    """How a process ended, by its status."""
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", which the kernel sends when memory runs out" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _is_halted(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False
