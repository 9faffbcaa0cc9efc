"""Whether a run fits into memory: what it is expected to need, against what is free and what other runs will take."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
from pydantic import ValidationError

from opd_mcp.devices.hardware import Target, gpus
from opd_mcp.schemas.errors import IntegrityError, ResourceError
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.runs import RunRecord
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.store import Store
from opd_mcp.store.worker_process import WORKER_FILE, WorkerProcess

MEMORY_OVERRIDE: dict[str, Any] = {
    "distill.micro_batch_tokens": 4096,
    "sft.micro_batch_tokens": 4096,
    "score.micro_batch_tokens": 4096,
    "rollout.batch_size": 32,
}


def with_claims(target: Target, store: Store, cpu_slots: int) -> Target:
    """The target with what active runs of the workspace are still expected to take there.

    A GPU is one run's alone, so nobody claims a part of it. On the CPU as many runs work at a time as there are slots:
    the largest others count, each with what it was expected to need and does not hold yet.
    """
    if target.kind != "cpu":
        return target
    records, all_on_cpu = active_records(store), not gpus()
    there = [record for record in records if all_on_cpu or record.request.recipe.runtime.device == "cpu"]
    claims = [unclaimed(store, record) for record in there]
    return replace(target, claimed=sum(sorted(claims, reverse=True)[: cpu_slots - 1]))


def active_records(store: Store) -> list[RunRecord]:
    """The records of the active runs; one that cannot be read claims nothing."""
    records = []
    for run_id in store.active_runs():
        with suppress(IntegrityError):
            records.append(store.record(run_id))
    return records


def unclaimed(store: Store, record: RunRecord) -> int:
    """Bytes that a run is expected to need and that its worker does not hold yet; 0 for a run without an estimate."""
    held = 0
    try:
        worker = WorkerProcess.from_json((store.workspace.run(record.run_id) / WORKER_FILE).read_bytes())
        process = psutil.Process(worker.pid)
        if process.create_time() == worker.started:
            held = process.memory_info().rss
    except (OSError, ValidationError, psutil.Error):
        held = 0  # a worker that is about to begin
    return max((record.expected_memory_bytes or 0) - held, 0)


def memory_shortage(needed: int, target: Target) -> Finding | None:
    """What is said when a run needs more than the target has: the numbers, and the overrides that lower the need."""
    if needed <= target.memory - target.claimed:
        return None
    claimed = f", and active runs are expected to take {byte_size(target.claimed)} more" if target.claimed else ""
    return Finding(
        code="not_enough_memory",
        message=f"It needs about {byte_size(needed)} of memory; {target.name} has {byte_size(target.memory)} "
        f"free{claimed}.",
        fix="Lower distill.micro_batch_tokens, sft.micro_batch_tokens, rollout.batch_size or max_new_tokens by "
        "overrides, choose smaller models, or wait until memory is free.",
    )


def require_memory(record: RunRecord, target: Target) -> None:
    """Raise ResourceError `not_enough_memory` for a new run that the target has no room for."""
    shortage = memory_shortage(record.expected_memory_bytes or 0, target)
    if shortage is not None:
        raise ResourceError(
            shortage.code, shortage.message, value=record.request.kind, fix=shortage.fix, call=shortage.call
        )
