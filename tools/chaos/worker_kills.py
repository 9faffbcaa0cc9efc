"""Workers that die: chains of SIGKILLs on a few runs, each resumed, which must end equal to undisturbed runs."""

import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd_mcp.schemas.runs import RunStatus
from tools.chaos.failpoints import Moment, Plan
from tools.chaos.workload import PHASES, Place, Work, arguments, differences, ended, evidence, failing_place, worker_pid

RANDOM = "random_moment"
MORE_ROUNDS = 6
# A worker starts up for two to three seconds, and then computes for as long.
RANDOM_SECONDS = (0.2, 6.0)
MOMENTS: tuple[Moment, ...] = ("before", "torn", "after")
KINDS = (
    *(f"phase_{name}" for name in PHASES["lightning"]),
    *("shard_write", "shard_rename", "checkpoint_write", "checkpoint_rename"),
    *("journal_append", "index_update", "artifact_publish", "lease_handover", RANDOM),
)


@dataclass
class Chain:
    """One run and its kills, in the order of its phases."""

    name: str
    work: Work
    plans: list[Plan]
    heartbeats: bool = False
    """Whether heartbeats instead of locks tell that its workers live."""
    kills: Counter[str] = field(default_factory=Counter)
    unreached: list[Plan] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """How many kills there were."""
        return self.kills.total()


PHASES_WITH: dict[str, tuple[str, ...]] = {
    "shard_write": ("rollout", "score"),
    "shard_rename": ("rollout", "score"),
    "checkpoint_write": ("sft", "distill"),
    "checkpoint_rename": ("sft", "distill"),
    "journal_append": ("sft", "distill"),
    "index_update": ("generate_responses", "benchmark"),
    "artifact_publish": ("sft", "score", "distill"),
    "lease_handover": ("generate_responses", "distill"),
    RANDOM: ("sft", "distill"),
    **{f"phase_{name}": (name,) for name in PHASES["lightning"]},
}
"""The phases in which each kind occurs; for a lease or a random moment, its position in the chain."""
HITS = {"checkpoint_write": 6, "checkpoint_rename": 2, "journal_append": 16, "index_update": 2}
ANYWHERE = ("lease_handover", RANDOM)


def kill_chains(seed: int, chains: dict[Work, int], kinds: Sequence[str], per_kind: int) -> list[Chain]:
    """Chains with `per_kind` kills of each kind, spread evenly over the chains whose phases have that kind."""
    rng = random.Random(f"{seed}/kills")
    made = [Chain(f"{work}-{number}", work, []) for work, count in chains.items() for number in range(count)]
    order = PHASES["lightning"]
    dealt: dict[str, list[tuple[int, Plan]]] = {chain.name: [] for chain in made}
    for kind in kinds:
        slots = [(chain, phase) for chain in made for phase in PHASES[chain.work] if phase in PHASES_WITH[kind]]
        rng.shuffle(slots)
        for number in range(per_kind if slots else 0):
            chain, phase = slots[number % len(slots)]
            within = None if kind in ANYWHERE or kind.startswith("phase_") else phase
            plan = Plan(kind, rng.randint(1, HITS.get(kind, 1)), rng.choice(MOMENTS), within=within)
            dealt[chain.name].append((order.index(phase), plan))
    for chain in made:
        rng.shuffle(dealt[chain.name])
        chain.plans = [plan for _, plan in sorted(dealt[chain.name], key=lambda pair: pair[0])]
        # Within a phase: first its start, then its work, then its end.
        chain.plans.sort(key=lambda plan: order_in_chain(plan, dealt[chain.name]))
    return sorted(made, key=lambda chain: -len(chain.plans))


def order_in_chain(plan: Plan, dealt: list[tuple[int, Plan]]) -> tuple[int, int]:
    """A plan's sort key: its phase, then its position between the phase's start and its publication."""
    phase = next(number for number, other in dealt if other is plan)
    late = {"artifact_publish": 2, "index_update": 3}
    return phase, 0 if plan.kind.startswith("phase_") else late.get(plan.kind, 1)


def run_chain(chain: Chain, root: Path, seed: int, expected: dict[str, Any]) -> Chain:
    """Stop and resume the chain's run until it succeeds; everything unexpected goes to `wrong`."""
    place, rng = failing_place(root / chain.name, chain.heartbeats), random.Random(f"{seed}/{chain.name}")
    service = place.service()
    waiting, run_id, attempts = deque(chain.plans), "", 0
    while True:
        plan = waiting.popleft() if waiting else None
        place.plan_file.unlink(missing_ok=True)
        if plan is not None and plan.kind != RANDOM:
            plan.save(place.plan_file)
        before = len(hits(place))
        if attempts:
            service.resume(run_id)
        else:
            run_id = service.start_distillation(arguments(chain.work, place.executor)).run_id
        attempts += 1
        shot = plan is not None and plan.kind == RANDOM and killed_from_outside(place, attempts, rng)
        status = ended(service, run_id)
        # A worker that had ended before its random moment was not killed.
        shot = (shot and status.state == "lost") or len(hits(place)) > before
        if plan is not None and shot:
            chain.kills[plan.kind] += 1
        chain.wrong += [f"{chain.name}: {alert.message}" for alert in status.alerts if alert.code in DAMAGE_ALERTS]
        if status.state == "succeeded":
            chain.unreached = [*([plan] if plan and not shot else []), *waiting]
            break
        if plan is None or not shot or unlike_plan(plan, status):
            chain.wrong.append(f"{chain.name}: {status.state} at {plan}: {status.error if shot else 'by itself'}")
            return chain
    unlike = differences(expected, evidence(place, status))
    chain.wrong += [f"{chain.name} ({run_id}) differs after {chain.killed} stops in: {name}" for name in unlike]
    return chain


def unlike_plan(plan: Plan, status: RunStatus) -> bool:
    """Whether a run ended in another way than planned."""
    if plan.action == "kill":
        return status.state != "lost"
    return status.state != "failed" or status.error is None or status.error.code != "not_enough_disk"


DAMAGE_ALERTS = ("damaged_journal", "checkpoint_damaged", "damaged_file")


def hits(place: Place) -> list[str]:
    """The failpoints that the workers of a place hit."""
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
    """For each kind of work an undisturbed run: its place and its final status."""
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


def run_chains(
    root: Path,
    seed: int,
    chains: list[Chain],
    undisturbed: dict[Work, tuple[Place, RunStatus]],
    tell: Callable[[str], None],
) -> list[Chain]:
    """Run the chains, two at a time, and more for the kills that they missed because a phase was already over."""
    expected = {work: evidence(*found) for work, found in undisturbed.items()}

    def run(chain: Chain) -> Chain:
        done = run_chain(chain, root, seed, expected[chain.work])
        tell(f"{done.name}: stopped {done.killed} times, {len(done.unreached)} not reached, {len(done.wrong)} wrong")
        for problem in done.wrong:
            tell(f"  {problem[:1000]}")
        return done

    with ThreadPoolExecutor(2) as pool:
        newest = done = list(pool.map(run, chains))
        for number in range(MORE_ROUNDS):
            newest = list(pool.map(run, chains_of_the_rest(newest, number)))
            done += newest
    return done


def chains_of_the_rest(chains: Sequence[Chain], number: int) -> list[Chain]:
    """Two chains per kind of work for the kills that it missed, each at the first hit."""
    left: dict[Work, list[Plan]] = {}
    for chain in chains:
        left.setdefault(chain.work, []).extend(replace(plan, hit=1) for plan in chain.unreached)
    halves = [(work, half, plans[half::2]) for work, plans in left.items() for half in (0, 1)]
    far = any(chain.heartbeats for chain in chains)
    return [Chain(f"{work}-more-{number}-{half}", work, plans, far) for work, half, plans in halves if plans]
