"""Workers that die: chains of SIGKILLs on a few runs, resumed each time, and equal at the end to runs left alone."""

import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_failpoints import Moment, Plan
from chaos_workload import PHASES, Place, Work, arguments, differences, ended, evidence, failing_place, worker_pid

from opd_mcp.schemas.runs import RunStatus

RANDOM = "random_moment"
# A worker needs two to three seconds before it computes, and computes for as long.
RANDOM_SECONDS = (0.2, 6.0)
MOMENTS: tuple[Moment, ...] = ("before", "torn", "after")
KINDS = (
    *(f"phase_{name}" for name in PHASES["lightning"]),
    *("shard_write", "shard_rename", "checkpoint_write", "checkpoint_rename"),
    *("journal_append", "index_update", "artifact_publish", "lease_handover", RANDOM),
)


@dataclass
class Chain:
    """One run's way through its kills, in the order of its phases."""

    name: str
    work: Work
    plans: list[Plan]
    kills: Counter[str] = field(default_factory=Counter)
    unreached: list[Plan] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """How many kills there were."""
        return self.kills.total()


def kill_plans(work: Work, rng: random.Random, rounds: int) -> list[Plan]:
    """`rounds` kills at every failpoint of every phase that has it, and as many at moments that nobody chose."""

    def plan(kind: str, phase: str | None = None, hits: int = 1) -> Iterable[Plan]:
        for _ in range(rounds):
            yield Plan(kind, rng.randint(1, hits), rng.choice(MOMENTS), within=phase)

    plans: list[Plan] = [*plan("lease_handover")]
    for phase in PHASES[work]:
        plans += plan(f"phase_{phase}")
        if phase in ("rollout", "score"):
            plans += [*plan("shard_write", phase), *plan("shard_rename", phase)]
        if phase in ("sft", "distill"):
            plans += [*plan("checkpoint_write", phase, 6), *plan("checkpoint_rename", phase, 2)]
            plans += [*plan("journal_append", phase, 20), *plan(RANDOM)]
        if phase in ("sft", "score", "distill"):
            plans += plan("artifact_publish", phase)
        if phase in ("generate_responses", "benchmark"):
            plans += plan("index_update", phase, 3)
    return plans


def run_chain(chain: Chain, root: Path, rng: random.Random, expected: dict[str, Any]) -> Chain:
    """Kill and resume the chain's run until it succeeds; what is not as it must be goes to `wrong`."""
    place = failing_place(root / chain.name)
    service = place.service()
    waiting, run_id, attempts = deque(chain.plans), None, 0
    while True:
        plan = waiting.popleft() if waiting else None
        place.plan_file.unlink(missing_ok=True)
        if plan is not None and plan.kind != RANDOM:
            plan.save(place.plan_file)
        before = len(hits(place))
        if run_id is None:
            run_id = service.start_distillation(arguments(chain.work)).run_id
        else:
            service.resume(run_id)
        attempts += 1
        shot = plan is not None and plan.kind == RANDOM and killed_from_outside(place, attempts, rng)
        status = ended(service, run_id)
        if status.state == "succeeded":
            chain.unreached = [*([plan] if plan and not shot else []), *waiting]
            break
        if status.state != "lost" or not (shot or len(hits(place)) > before):
            chain.wrong.append(f"{chain.name}: {status.state} at {plan}: {status.error}")
            return chain
        assert plan is not None
        chain.kills[plan.kind] += 1
        chain.wrong += [f"{chain.name}: {alert.message}" for alert in status.alerts if alert.code in DAMAGE_ALERTS]
    unlike = differences(expected, evidence(place, status))
    chain.wrong += [f"{chain.name} ({run_id}) differs after {chain.killed} kills in: {name}" for name in unlike]
    return chain


DAMAGE_ALERTS = ("damaged_journal", "checkpoint_damaged", "damaged_file")


def hits(place: Place) -> list[str]:
    """What the workers of a place hit."""
    lines = place.log.read_text(encoding="utf-8").splitlines() if place.log.exists() else []
    return [line for line in lines if not line.endswith(" started")]


def killed_from_outside(place: Place, attempt: int, rng: random.Random) -> bool:
    """Whether the attempt's worker was still there to be killed at a random moment."""
    delay, deadline = rng.uniform(*RANDOM_SECONDS), time.monotonic() + 60
    while (pid := worker_pid(place, attempt)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    try:
        os.kill(pid or -1, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def references(root: Path, works: Iterable[Work]) -> dict[Work, tuple[Place, RunStatus]]:
    """By work, the place of a run that nobody disturbed, and how it ended."""
    runs = {}
    for work in works:
        place = Place(root / f"undisturbed-{work}")
        service = place.service()
        runs[work] = place, service, service.start_distillation(arguments(work)).run_id
    found = {}
    for work, (place, service, run_id) in runs.items():
        status = ended(service, run_id)
        if status.state != "succeeded":
            raise RuntimeError(f"the undisturbed run of {work} ended as {status.state}: {status.error}")
        found[work] = place, status
    return found


def killed_workers(
    root: Path,
    seed: int,
    chains: dict[Work, int],
    rounds: int,
    undisturbed: dict[Work, tuple[Place, RunStatus]],
    tell: Callable[[str], None],
) -> list[Chain]:
    """All chains, two at a time, with those that take up what the first ones did not reach."""
    expected = {work: evidence(*found) for work, found in undisturbed.items()}
    planned = []
    for work, count in chains.items():
        for number in range(count):
            rng = random.Random(f"{seed}/{work}/{number}")
            planned.append((Chain(f"{work}-{number}", work, kill_plans(work, rng, rounds)), rng))

    def run(pair: tuple[Chain, random.Random]) -> Chain:
        chain, rng = pair
        done = run_chain(chain, root, rng, expected[chain.work])
        tell(f"{done.name}: {done.killed} kills, {len(done.unreached)} not reached, {len(done.wrong)} wrong")
        return done

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, planned))
