"""Ranks on other machines of a cluster's job: how they are started there, and how they reach the worker.

A rank here has a socket pair with its worker. One on another machine connects to the worker's gate, a port of the
worker's machine, and shows a token that only this job's processes are told, on their standard input. Both lines are the
same afterwards; where one ends, the rank ends.
"""

import hmac
import json
import os
import secrets
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

WATCH_SECONDS = 0.5
CONNECT_SECONDS = 60.0
HELLO_BYTES = 4096

Start = Callable[[str, Sequence[str]], list[str]]
"""The command that runs a command on a machine: machine, command."""


@dataclass(frozen=True)
class FarRank:
    """A rank on another machine: which one, the GPU's number there (None: the CPU), and where its worker is."""

    host: str
    device_number: int | None
    worker_host: str


def by_srun(host: str, command: Sequence[str]) -> list[str]:
    """Slurm's: a step of the job that the worker is in, beside it and others, with what the job has of that machine."""
    step = ("--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--kill-on-bad-exit=1", "--cpu-bind=none")
    return ["srun", "--quiet", *step, "--export=ALL", *command]


def share_of(devices: int, hosts: int) -> list[int]:
    """How many of the devices are on each machine: as many as fit an even share, the last ones may have fewer."""
    each = -(-devices // max(hosts, 1))
    return [max(0, min(each, devices - each * host)) for host in range(hosts)]


def even_nodes(here: int, far: Sequence[FarRank]) -> int:
    """How many machines the ranks are on, where equally many are on each; else 1."""
    counts = Counter(rank.host for rank in far)
    return 1 + len(counts) if set(counts.values()) <= {here} else 1


@dataclass
class Gate:
    """Where the ranks of other machines come in; a context manager, closed once all are there."""

    addresses: Sequence[str]
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("", 0), backlog=128)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *given: object) -> None:
        self._listener.close()

    def facts(self, rank: int) -> dict[str, Any]:
        """What a rank must know to come in."""
        port = self._listener.getsockname()[1]
        return {"addresses": list(self.addresses), "port": port, "token": self.token, "rank": rank}

    def admitted(self, ranks: Sequence[int], given_up: Callable[[], bool], seconds: float) -> dict[int, socket.socket]:
        """The line of each of these ranks, as far as they came before somebody gave up or the time was over.

        Who does not show the token is turned away.
        """
        lines: dict[int, socket.socket] = {}
        end = time.monotonic() + seconds
        while set(ranks) - set(lines) and time.monotonic() < end and not given_up():
            if not select.select([self._listener], [], [], WATCH_SECONDS)[0]:
                continue
            line, _ = self._listener.accept()
            line.settimeout(5.0)
            rank = self._named(line)
            if rank is not None and rank in ranks and rank not in lines:
                line.settimeout(None)
                lines[rank] = line
            else:
                line.close()
        return lines

    def _named(self, line: socket.socket) -> int | None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            said = json.loads(_first_line(line))
            if hmac.compare_digest(str(said["token"]), self.token):
                return int(said["rank"])
        return None


def _first_line(line: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"\n") and len(said) < HELLO_BYTES:
        data = line.recv(1)  # not a byte of what comes after it
        if not data:
            break
        said += data
    return said


def come_in(facts: dict[str, Any]) -> socket.socket:
    """A rank's line to the worker, at the first of its addresses that answers; raises OSError when none does."""
    problem: OSError | None = None
    for address in facts["addresses"]:
        try:
            line = socket.create_connection((address, facts["port"]), timeout=CONNECT_SECONDS)
        except OSError as error:
            problem = error
            continue
        line.settimeout(None)
        line.sendall(json.dumps({"token": facts["token"], "rank": facts["rank"]}).encode() + b"\n")
        return line
    raise problem or OSError("the worker has no address")


def end_with(line: socket.socket) -> None:
    """End this process when the other end of its line is gone."""

    def watch() -> None:
        while True:
            select.select([line], [], [])
            if line.recv(1, socket.MSG_PEEK) == b"":
                os._exit(1)
            time.sleep(WATCH_SECONDS)  # an answer, which somebody here reads

    def safely() -> None:
        with suppress(OSError):
            watch()
        os._exit(1)

    threading.Thread(target=safely, name="worker watch", daemon=True).start()


def show_own_device(number: int | None) -> None:
    """Let this rank see one of the GPUs that the job has of its machine, the one with this number; None: none.

    Before torch is imported.
    """
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if number is None else (seen[number] if seen else str(number))
