"""Where a distillation stops scaling: the whole pipeline simulated on 1 to 1,024 devices.

Run: `python tools/bench/scale_simulation.py [--json FILE]`. Nothing runs on a device. Speeds of one device are those of
docs/gpu-h200.json (measured) where it has them; everything else is an assumption, and every one is printed. Several
machines, and several devices for other phases than training, are simulated as if they were here (docs/scale.md).
"""

import argparse
import heapq
import json
import sys
from collections import deque
from dataclasses import asdict, dataclass
from math import ceil, log
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DEVICES = tuple(2**power for power in range(11))
PHASES = ("rollout", "score", "distill")


@dataclass(frozen=True)
class Assumptions:
    """All that the simulation takes as given; bytes, seconds and tokens."""

    rollouts: int = 38_400
    prompt_tokens: int = 300
    response_tokens: int = 4096
    shard_rows: int = 64
    steps: int = 150
    batch_rows: int = 256
    micro_batch_tokens: int = 16_384
    student_parameters: float = 1.72e9
    student_vocabulary: float = 151_936 * 2048
    # of one device: the measured ones are replaced by docs/gpu-h200.json's
    training_tokens_per_second: float = 34_800.0
    scoring_tokens_per_second: float = 60_000.0
    # 16,667 tokens per second at 0.6B (measured), divided by the weights that each step reads
    generation_tokens_per_second: float = 16_667.0 * 0.6 / 1.72
    devices_per_machine: int = 8
    # each machine holds the student, and machines exchange gradients alone; else all devices hold it together
    replicated: bool = True
    bandwidth_inside: float = 400e9
    bandwidth_between: float = 50e9
    collective_latency: float = 30e-6
    layers: int = 28
    # spread of a device's speed from shard to shard and step to step (log-normal)
    straggling: float = 0.05
    device_mtbf: float = 30_000 * 3600.0
    restart: float = 120.0
    phase_start: float = 60.0
    checkpoint_seconds: float = 60.0
    checkpoint_bandwidth: float = 1e9
    seed: int = 0


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase, failures in it, and what most of the time that is not ideal went into."""

    seconds: float
    failures: int
    limit: str


def measured(assumed: Assumptions) -> Assumptions:
    """The assumptions with the speeds of one device that were measured: a 1.7B student and a 4B teacher."""
    speed = json.loads((ROOT / "docs" / "gpu-h200.json").read_bytes())["speed"]
    values = asdict(assumed)
    values["training_tokens_per_second"] = speed["1.7B"]["training_tokens_per_second"]
    values["scoring_tokens_per_second"] = speed["4B"]["scoring_tokens_per_second"]
    return Assumptions(**values)


def by_shards(given: Assumptions, devices: int, seconds_per_row: float, rng: np.random.Generator) -> PhaseTime:
    """Rows in shards that free devices take one after the other; the shard of a device that fails is taken again."""
    shards = deque([given.shard_rows] * (given.rollouts // given.shard_rows))
    if given.rollouts % given.shard_rows:
        shards.append(given.rollouts % given.shard_rows)
    count, failures, end = len(shards), 0, 0.0
    free = [(given.phase_start, device) for device in range(devices)]
    while shards:
        at, device = heapq.heappop(free)
        rows = shards.popleft()
        done = at + rows * seconds_per_row * rng.lognormal(0.0, given.straggling)
        fails = at + rng.exponential(given.device_mtbf)
        if fails < done:
            failures += 1
            shards.append(rows)
            heapq.heappush(free, (fails + given.restart, device))
            continue
        end = max(end, done)
        heapq.heappush(free, (done, device))
    ideal = given.rollouts * seconds_per_row / devices
    if end <= 1.1 * ideal:
        limit = "none"
    elif given.phase_start > (end - ideal) / 2:
        limit = "start of the phase"
    else:
        limit = f"{count} shards for {devices} devices" if count < 10 * devices else "stragglers and failures"
    return PhaseTime(end, failures, limit)


def step_parts(given: Assumptions, devices: int, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of one training step by part: compute of the slowest rank, and communication that it does not hide."""
    row = given.prompt_tokens + given.response_tokens
    rows = ceil(given.batch_rows / devices)  # whole rows: more ranks than rows stand idle
    compute = rows * row / given.training_tokens_per_second * rng.lognormal(0.0, given.straggling, devices).max()
    if devices == 1:
        return {"compute": compute, "communication": 0.0}
    within = min(devices, given.devices_per_machine) if given.replicated else devices
    share, replicas = (within - 1) / within, devices / within
    bandwidth = given.bandwidth_inside if within <= given.devices_per_machine else given.bandwidth_between
    body = given.student_parameters - given.student_vocabulary
    micro = max(1, ceil(rows * row / given.micro_batch_tokens))
    # two bf16 gathers (forward and backward) and one float32 reduce-scatter per layer and micro-batch
    layers = micro * (8 * body * share / bandwidth + 3 * given.layers * given.collective_latency * log(within, 2))
    window = 8 * given.student_vocabulary * share / bandwidth  # float32 gathered, float32 gradient scattered
    # a rank's part of the float32 gradient, added up over the replicas once per step
    between = 8 * given.student_parameters / within * (1 - 1 / replicas) / given.bandwidth_between
    return {"compute": compute, "communication": max(0.0, layers - compute) + window + between}


def trained(given: Assumptions, devices: int, rng: np.random.Generator) -> PhaseTime:
    """Steps of all ranks together; a failure of any loses what came after the last checkpoint, and a restart."""
    clock, step, saved, failures = given.phase_start, 0, 0, 0
    cost = 12 * given.student_parameters / (given.checkpoint_bandwidth * min(devices, given.devices_per_machine))
    due, spent = clock + max(given.checkpoint_seconds, 25 * cost), {"compute": 0.0, "communication": 0.0, "lost": 0.0}
    fails = clock + rng.exponential(given.device_mtbf / devices)
    ideal = given.steps * given.batch_rows * (given.prompt_tokens + given.response_tokens)
    ideal /= given.training_tokens_per_second * devices
    while step < given.steps:
        parts = step_parts(given, devices, rng)
        end = clock + sum(parts.values())
        if fails < end:
            failures += 1
            spent["lost"] += given.restart + end - clock
            clock, step = fails + given.restart, saved
            fails = clock + rng.exponential(given.device_mtbf / devices)
            continue
        clock, step = end, step + 1
        for name, seconds in parts.items():
            spent[name] += seconds
        if clock >= due:
            saved, due = step, clock + max(given.checkpoint_seconds, 25 * cost)
    if clock <= 1.1 * ideal:
        return PhaseTime(clock, failures, "none")
    excess = {
        "start of the phase": given.phase_start,
        "communication": spent["communication"],
        "lost steps and restarts": spent["lost"],
        f"{given.batch_rows} rows per step, and the slowest rank": spent["compute"] - ideal,
    }
    return PhaseTime(clock, failures, max(excess, key=lambda name: excess[name]))


def simulated(given: Assumptions, devices: int) -> dict[str, PhaseTime]:
    """The phases of a lightning distillation on so many devices."""
    rng = np.random.default_rng([given.seed, devices])
    row = given.prompt_tokens + given.response_tokens
    return {
        "rollout": by_shards(given, devices, given.response_tokens / given.generation_tokens_per_second, rng),
        "score": by_shards(given, devices, row / given.scoring_tokens_per_second, rng),
        "distill": trained(given, devices, rng),
    }


def report(given: Assumptions) -> dict[str, Any]:
    """Hours, efficiency and limits by number of devices, with the assumptions."""
    found: dict[int, dict[str, PhaseTime]] = {devices: simulated(given, devices) for devices in DEVICES}
    alone = sum(phase.seconds for phase in found[1].values())
    rows = []
    for devices, phases in found.items():
        total = sum(phase.seconds for phase in phases.values())
        rows.append(
            {
                "devices": devices,
                "hours": {name: round(phase.seconds / 3600, 3) for name, phase in phases.items()},
                "total_hours": round(total / 3600, 3),
                "efficiency": round(alone / total / devices, 3),
                "failures": sum(phase.failures for phase in phases.values()),
                "limits": {name: phase.limit for name, phase in phases.items() if phase.limit != "none"},
            }
        )
    return {"simulated": True, "assumptions": asdict(given), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    names = "devices | rollouts | scores | training | hours | efficiency | what limits"
    lines = [f"| {names} |", "|--:|--:|--:|--:|--:|--:|---|"]
    for row in found["rows"]:
        hours = " | ".join(f"{row['hours'][name]:.2f}" for name in PHASES)
        limits = "; ".join(f"{name}: {limit}" for name, limit in row["limits"].items())
        lines.append(f"| {row['devices']} | {hours} | {row['total_hours']:.2f} | {row['efficiency']:.0%} | {limits} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report there")
    arguments = parser.parse_args()
    found = report(measured(Assumptions()))
    print(table(found))
    print()
    print(json.dumps(found["assumptions"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
