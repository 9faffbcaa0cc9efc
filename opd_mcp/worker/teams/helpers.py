"""Generation and scoring on several devices: helper processes compute parts of what the worker computes.

    worker (its stage, run lock, journal, publication; a device of its own, on which it computes parts as well)
      └─ helper 1 … N − 1: one per further device; read which jobs there are on stdin, leave parts in their folders

Helpers decide nothing and report nothing. One that ends costs the part that it was at, which another process computes;
all end with the phase, or with the worker.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from opd_mcp.schemas.recipes import RuntimeRecipe
from opd_mcp.worker.teams.ranks import GROUP_SECONDS, ending, rank_environment

FOLDER_PREFIX = "helpers-"
COMMAND = (sys.executable, "-P", "-m", "opd_mcp.worker.teams.helper_process")


@dataclass
class HelperTeam:
    """The helpers of one phase, for `Context.helpers`; `devices` a GPU's UUID, or None for the CPU, per helper.

    They are started when there is a first job. `patience` are the seconds for which they are waited for.
    """

    devices: Sequence[str | None]
    runtime: RuntimeRecipe
    directory: Path
    alert: Callable[[str, str], None]
    patience: float = GROUP_SECONDS
    command: Sequence[str] = COMMAND
    folder: Path = field(init=False)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _told: set[int] = field(default_factory=set)

    @contextmanager
    def working(self) -> Iterator[Self]:
        """The team with a folder of its own; at the end no helper lives. What an earlier attempt left is removed."""
        for left in self.directory.glob(f"{FOLDER_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.folder = self.directory / f"{FOLDER_PREFIX}{secrets.token_hex(4)}"
        self.folder.mkdir(mode=0o700)
        try:
            yield self
        finally:
            self._end()
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def count(self) -> int:
        """As the protocol."""
        return len(self.devices)

    def share(self, job: Path) -> None:
        """As the protocol."""
        if not self.processes:
            self._start()
        for process in self.processes:
            self._tell(process, {"job": str(job)})

    def check(self) -> None:
        """As the protocol: `helper_lost`, once for each."""
        for number, process in enumerate(self.processes):
            if number not in self._told and (code := process.poll()) is not None:
                self._told.add(number)
                self.alert(
                    "helper_lost",
                    f"Helper {number + 1} of {self.count} (process {process.pid}) {ending(code)}: the phase continues "
                    "without it. The end of the log may say why.",
                )

    def give_up(self) -> None:
        """As the protocol."""
        living = [number for number, process in enumerate(self.processes) if process.poll() is None]
        if not living:
            return
        self._end()
        self._told.update(living)
        self.alert(
            "helper_lost",
            f"A part of the work was not done within {self.patience:g} s of what others take: all helpers were ended, "
            "and the phase continues without them.",
        )

    def _start(self) -> None:
        for device in self.devices:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, env=rank_environment(os.environ, device), bufsize=0
            )
            assert process.stdin is not None, "a helper reads its work"
            os.set_blocking(process.stdin.fileno(), False)  # a line that finds no room is a job that it misses
            self.processes.append(process)
            self._tell(process, {"worker": os.getpid(), "runtime": self.runtime.to_dict()})

    def _tell(self, process: subprocess.Popen[bytes], facts: dict[str, object]) -> None:
        assert process.stdin is not None, "a helper reads its work"
        with suppress(BrokenPipeError):  # it has ended, which `check` tells
            process.stdin.write(json.dumps(facts).encode() + b"\n")

    def _end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()
            with suppress(BrokenPipeError):
                assert process.stdin is not None, "a helper reads its work"
                process.stdin.close()
