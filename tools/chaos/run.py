"""Kills, full disks, damage, contention, hangs and lost indexes against the real product; exits with 1 below a bar.

Run: `make chaos` or `python tools/chaos/run.py [--seed N] [--quick] [--only PART] [--hangs N] [--index-losses N]`; the
parts are worker, server, enospc, damage, contention, hang and index. The last line is the result in JSON.
With `--heartbeats` the parts worker, server and enospc have no locks: an executor places their runs, and claims and
heartbeats alone tell whether a worker lives. The undisturbed runs stay those of this machine.
The same seed chooses the same failpoints, bytes and calls; times differ. docs/reliability.md says what each part
proves. The product has no failpoints: failpoints.py replaces the system calls below it.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.schemas.runs import RunStatus
from tools.chaos.contention import contention
from tools.chaos.damage import damaged
from tools.chaos.full_disk import full_disk_chain, full_stores
from tools.chaos.hangs import hung_workers
from tools.chaos.index_losses import lost_indexes
from tools.chaos.server_kills import killed_servers
from tools.chaos.worker_kills import KINDS, Chain, kill_chains, references, run_chains
from tools.chaos.workload import Place, Work, far_place, reach_far

PARTS = ("worker", "server", "enospc", "damage", "contention", "hang", "index")
FAR_PARTS = ("worker", "server", "enospc")
"""Where it matters how a worker is told alive; the others look at one machine's files and processes."""


@dataclass(frozen=True)
class Size:
    """How many chains, kills, servers and damages; the bars follow from these numbers."""

    chains: dict[Work, int]
    kills_per_kind: int
    kills: int
    servers: int
    enospc_phases: tuple[tuple[str, ...], ...]
    enospc: int
    damage: int
    contention_seconds: float
    hangs: int
    index_losses: int


FULL = Size(
    chains={"lightning": 3, "live": 2, "sft": 2},
    kills_per_kind=8,
    kills=100,
    servers=50,
    enospc_phases=(("generate_responses", "sft", "rollout"), ("score", "distill", "benchmark")),
    enospc=50,
    damage=240,
    contention_seconds=60.0,
    hangs=33,
    index_losses=35,
)
QUICK = Size(
    chains={"lightning": 1},
    kills_per_kind=0,
    kills=5,
    servers=5,
    enospc_phases=(),
    enospc=50,
    damage=40,
    contention_seconds=5.0,
    hangs=3,
    index_losses=7,
)
QUICK_KINDS = ("phase_sft", "checkpoint_write", "checkpoint_rename", "shard_write", "phase_distill")
"""The kinds of kills in the short run, one each."""


class Chaos:
    """The parts, all in one folder; each adds its fields to the result and its problems to the list."""

    def __init__(
        self, root: Path, seed: int, size: Size, tell: Callable[[str], None], heartbeats: bool = False
    ) -> None:
        self.root = root
        self.seed = seed
        self.size = size
        self.tell = tell
        self.heartbeats = heartbeats
        self.result: dict[str, int] = {}
        self.problems: list[str] = []
        self._undisturbed: dict[Work, tuple[Place, RunStatus]] = {}

    def undisturbed(self, works: set[Work]) -> dict[Work, tuple[Place, RunStatus]]:
        """The undisturbed runs, each made once."""
        missing = works - self._undisturbed.keys()
        self._undisturbed |= references(self.root, sorted(missing))
        return self._undisturbed

    def worker(self) -> None:
        """SIGKILL of workers."""
        quick = self.size.kills_per_kind == 0
        kinds, per_kind = (QUICK_KINDS, 1) if quick else (KINDS, self.size.kills_per_kind)
        chains = kill_chains(self.seed, self.size.chains, kinds, per_kind)
        done = self._run_chains("kills", chains, self.undisturbed(set(self.size.chains)))
        kinds_hit = sum((chain.kills for chain in done), Counter[str]())
        self.tell(f"worker kills by failpoint: {dict(sorted(kinds_hit.items()))}")
        equal = sum(chain.killed for chain in done if not chain.wrong)
        self.result |= {"worker_kills": kinds_hit.total(), "worker_kills_equal": equal}
        self._problems_of(done)
        self._require(kinds_hit.total() >= self.size.kills, f"{kinds_hit.total()} kills are under {self.size.kills}")
        for kind in kinds:
            self._require(kinds_hit[kind] >= per_kind, f"{kind} was hit {kinds_hit[kind]} times, under {per_kind}")

    def server(self) -> None:
        """SIGKILL of servers."""
        place = (far_place if self.heartbeats else Place)(self.root / "servers")
        found = anyio.run(killed_servers, place, self.seed, self.size.servers, self.tell)
        self.tell(f"server kills by failpoint: {dict(sorted(found.kills.items()))}")
        during = found.kills.total()
        self.result |= {"server_kills": during, "lost_or_duplicate": len(found.wrong)}
        self.problems += found.wrong
        self._require(during >= self.size.servers, f"{during} servers were killed during a call")

    def enospc(self) -> None:
        """Full disks."""
        points, corrupt = full_stores(self.root / "stores", self.tell)
        chains = [full_disk_chain(self.seed, phases) for phases in self.size.enospc_phases]
        undisturbed = self.undisturbed({"lightning"}) if chains else {}
        done = self._run_chains("full", chains, undisturbed)
        self._problems_of(done)
        self.problems += corrupt
        in_worker = sum(chain.killed for chain in done)
        if done:
            self.tell(f"full disk in workers: {dict(sorted(sum((c.kills for c in done), Counter[str]()).items()))}")
        wrong = len(corrupt) + sum(len(chain.wrong) for chain in done)
        self.result |= {"enospc_points": points + in_worker, "corrupt": wrong}
        self._require(points + in_worker >= self.size.enospc, f"{points + in_worker} points are too few")

    def damage(self) -> None:
        """Flipped and truncated bytes."""
        undisturbed = self.undisturbed({"lightning"})["lightning"]
        found = damaged(self.root / "damage", self.seed, self.size.damage, undisturbed, self.tell)
        silent = [f"{item.file}, {item.how}: {item.why}" for item in found if item.outcome == "silent"]
        self.tell(f"damage: {dict(Counter(item.outcome for item in found))}")
        self.result |= {"damage": len(found), "silent": len(silent)}
        self.problems += silent

    def contention(self) -> None:
        """Many processes on one workspace."""
        errors = contention(self.root / "crowd", self.seed, self.size.contention_seconds, self.tell)
        self.result["contention_errors"] = len(errors)
        self.problems += errors

    def hang(self) -> None:
        """Workers that do not answer."""
        found = hung_workers(self.root / "hangs", self.seed, self.size.hangs, self.tell)
        self.result |= {"hangs": found.kinds.total(), "hangs_ended": found.ended}
        self.problems += found.wrong

    def index(self) -> None:
        """Losses of the index."""
        found = anyio.run(lost_indexes, self.root / "index", self.seed, self.size.index_losses, self.tell)
        self.result |= {"index_losses": found.kinds.total(), "index_lost_or_duplicate": len(found.wrong)}
        self.problems += found.wrong

    def _run_chains(
        self, name: str, chains: list[Chain], undisturbed: dict[Work, tuple[Place, RunStatus]]
    ) -> list[Chain]:
        for chain in chains:
            chain.heartbeats = self.heartbeats
        return run_chains(self.root / name, self.seed, chains, undisturbed, self.tell)

    def _problems_of(self, chains: list[Chain]) -> None:
        self.problems += [problem for chain in chains for problem in chain.wrong]

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="about three minutes; `make test-tools` runs this")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--heartbeats", action="store_true", help="without locks; parts: worker, server, enospc")
    parser.add_argument("--hangs", type=int, help="how many workers hang in this part")
    parser.add_argument("--index-losses", type=int, help="how often the index is lost in this part")
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    tell(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="opd-chaos-") as folder:
        given = {name: getattr(arguments, name) for name in ("hangs", "index_losses") if getattr(arguments, name)}
        size = replace(QUICK if arguments.quick else FULL, **given)
        chaos = Chaos(Path(folder), seed, size, tell, arguments.heartbeats)
        if arguments.heartbeats:
            reach_far(Path(folder))
        for part in arguments.only or (FAR_PARTS if arguments.heartbeats else PARTS):
            run_part(chaos, part)
            tell(f"{part} done")
    for problem in chaos.problems[:40]:
        tell(f"PROBLEM {problem}")
    print(json.dumps(chaos.result))
    return int(bool(chaos.problems))


def run_part(chaos: Chaos, part: str) -> None:
    """Run the part of this name."""
    parts: dict[str, Callable[[], Any]] = {name: getattr(chaos, name) for name in PARTS}
    parts[part]()


if __name__ == "__main__":
    sys.exit(main())
