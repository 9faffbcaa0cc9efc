"""Damaged files: each is read or refused with one OpdError, in bounded time and memory.

Run: `python tools/fuzz/readers.py [--files 20000] [--seed 0] [--json FILE]`. It damages sound files of every
kind that the project reads (`damage.py`). Journal lines and sealed records get a matching checksum, so that the damage
reaches the reader behind it. Exits with 1 and prints the cases that raise anything but an OpdError or take over ten
seconds of CPU time; the address space is limited, to catch readers that allocate the length that a file claims.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.cache.shards import write_shard
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.identity.data.reading import read_prompts, read_responses, read_responses_header
from opd_mcp.identity.data.scan import scan_of_rows
from opd_mcp.identity.files import file_sha256
from opd_mcp.identity.lineage import verified_lineage, write_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.planning.costs.run_workload import model_shape
from opd_mcp.planning.costs.workload import DataSize, Workload
from opd_mcp.planning.prompts.text_child import answer
from opd_mcp.planning.prompts.text_work import Asked
from opd_mcp.schemas.base import first_problem
from opd_mcp.schemas.cache import CacheManifest, RolloutStatistics, ScoreStatistics
from opd_mcp.schemas.errors import IntegrityError, OpdError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.next_action import NextAction
from opd_mcp.schemas.plans import ConsistencyVerdict, Plan
from opd_mcp.schemas.recipes import PromptingRecipe, Recipe, Sampling
from opd_mcp.schemas.reports import CheckpointRecord, LoopState
from opd_mcp.schemas.requests import PlanDistillation
from opd_mcp.schemas.runs import RunInputs, RunPhase, RunRecord, RunRequest
from opd_mcp.store.artifacts import ArtifactRecord, read_artifact
from opd_mcp.store.journal import JournalWriter, next_attempt
from opd_mcp.store.run_view import RunView
from opd_mcp.store.runs import create_run, read_record
from opd_mcp.store.workspace import Workspace, read_arguments, read_plan, save_plan
from opd_mcp.views.cache import inspect_cache
from opd_mcp.views.status import snapshot_of, status_of
from tools import EXAMPLE
from tools.fuzz.damage import (
    damaged_bytes,
    damaged_journal,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_seal,
    damaged_table,
)

SECONDS_A_FILE = 10
MEMORY_BYTES = 6 << 30
Damage = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A sound file, the damage for it, and its reader."""

    name: str
    file: Path
    damage: Damage
    read: Callable[[], Any]


class TooSlow(BaseException):
    """A reader took longer than SECONDS_A_FILE."""


def data_targets(root: Path) -> list[Target]:
    """Prompts and responses in both formats."""
    lines = (EXAMPLE / "opd.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    lines.append(json.dumps({"messages": [{"role": "user", "content": "1+1=?"}], "answer": 2, "id": 7}))
    prompts = root / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"id": str(i), "prompt": f"{i}+1=?", "response": "é" * i, "response_ids": list(range(i))} for i in range(40)
    ]
    responses = root / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parquet = root / "table.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet, compression="zstd", row_group_size=16)

    def header_and_rows() -> None:
        read_responses_header(parquet)
        read_responses(parquet)

    return [
        Target("prompts.jsonl", prompts, damaged_lines, lambda: read_prompts(prompts)),
        Target("responses.jsonl", responses, damaged_lines, lambda: read_responses(responses)),
        Target("parquet", parquet, damaged_table, header_and_rows),
    ]


def model_targets(root: Path) -> list[Target]:
    """The files of a model directory, and its lineage."""
    model = Path(shutil.copytree(EXAMPLE / "student", root / "model"))
    write_lineage(model, Lineage(kind="model", stage="sft", recipe={"a": 1}, model=inspect_model(model).identity))
    scan = scan_of_rows(read_prompts(EXAMPLE / "tune.jsonl")[:5])
    teacher = model_shape(inspect_model(EXAMPLE / "teacher"))

    def look() -> None:
        size = model_shape(inspect_model(model))
        workload = Workload(Recipe(), size, teacher, DataSize(10, 5.0, 10, 10))
        for phase in ("sft", "rollout", "score", "distill", "benchmark"):
            workload.work(phase)
        answer(Asked(model, PromptingRecipe(), scan, "all").request())
        verified_lineage(model, full=True)

    damages: dict[str, Damage] = dict.fromkeys(
        ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        damaged_json,
    )
    damages |= {
        "lineage.json": damaged_seal,
        "chat_template.jinja": damaged_bytes,
        "model.safetensors": damaged_safetensors,
    }
    return [Target(name, model / name, damage, look) for name, damage in damages.items()]


def cache_targets(root: Path) -> list[Target]:
    """The manifest and a shard of a teacher cache."""
    cache = root / "cache"
    shutil.copytree(EXAMPLE / "student", cache / "tokenizer")
    rows = build_sequences(
        [[3, 4, 5]] * 8, [[5, 6, 1]] * 8, finish_reasons=["eos"] * 8, prompt_row_ids=[str(i) for i in range(8)]
    )
    scores = np.full(24, -1.0, dtype=np.float32)
    shard = write_shard(
        cache / "shard-00000.parquet", rows.with_columns(teacher_logprobs=scores, behaviour_logprobs=scores)
    )
    identity = inspect_model(EXAMPLE / "student").identity
    drawn = {"rows": 8, "response_tokens": 24, "mean_response_tokens": 3.0, "truncated_fraction": 0.0}
    manifest = CacheManifest(
        teacher=identity, behaviour=identity, prompts_sha256="0" * 64, sampling=Sampling(), seed=0, eos_token_ids=[1],
        topk=0, dtype="float32", vocab_size=24, shards=[shard], scores=ScoreStatistics(mean_teacher_logprob=-1.0),
        rollouts=RolloutStatistics(**drawn, eos_fraction=1.0, empty_responses=0, duplicate_rows=0),
    )  # fmt: skip
    file = cache / "manifest.json"
    file.write_text(manifest.to_json(indent=2), encoding="utf-8")

    def look() -> None:
        inspect_cache(cache)
        read_cache(cache)

    def look_at_vouched() -> None:
        now = shard.model_copy(update={"sha256": file_sha256(cache / shard.file)})
        sound = file.read_bytes()
        file.write_text(manifest.model_copy(update={"shards": [now]}).to_json(), encoding="utf-8")
        try:
            look()
        finally:
            file.write_bytes(sound)

    return [
        Target("manifest.json", file, damaged_seal, look),
        Target("shard", cache / shard.file, damaged_bytes, look),
        Target("shard, vouched for", cache / shard.file, damaged_table, look_at_vouched),
    ]


def workspace_targets(root: Path) -> list[Target]:
    """A run's record and journal, a plan with its arguments, an artifact's record, and a checkpoint's."""
    workspace = Workspace(root / "home")
    request = RunRequest(
        kind="sft", recipe=Recipe(), inputs=RunInputs(), phases=[RunPhase(name="sft", key="k" * 64)], plan_id="plan-1"
    )
    record = RunRecord(
        run_id="sft-x-000000", created_at="2026-01-01T00:00:00.000Z", request_hash="h", request=request, versions={},
        hardware="cpu",
    )  # fmt: skip
    run = create_run(workspace, record)
    journal = run / "journal.jsonl"
    with JournalWriter(journal, 1) as writer:
        writer.append("state", {"state": "queued"})
        writer.append("state", {"state": "running"})
        writer.append("phase", {"phase": "sft", "event": "started"})
        for step in range(1, 6):
            writer.append("metric", {"step": step, "values": {"loss": 1.0 / step}})
            writer.append("progress", {"done": step, "total": 5, "unit": "steps"})
        writer.append("alert", {"code": "odd", "message": "something"})
        cost = {"stage": "sft", "seconds": 1.0, "device": "cpu"}
        writer.append("phase", {"phase": "sft", "event": "finished", "cost": cost, "artifact_id": "model-1"})
        writer.append("phase", {"phase": "distill", "event": "resumed", "step": 2})
        writer.append("result", {"artifacts": {"sft": "model-1"}})
        writer.append("error", {"code": "x", "cause": "y", "fix": "z", "log_tail": ["a"]})
        writer.append("state", {"state": "failed"})

    def look() -> None:
        view = RunView(run).refresh()
        status_of(view, record, None).to_json()
        snapshot_of(view, record).to_json()
        assert RunView(run, keep_series=True).fold().device_seconds >= 0
        JournalWriter(journal, next_attempt(journal)).close()

    plan = Plan(
        plan_id="plan-1", method="lightning", inputs=RunInputs(), recipe=Recipe(), phases=[],
        consistency=ConsistencyVerdict(status="unknown"), estimates=[], next_action=NextAction(why="start"),
    )  # fmt: skip
    save_plan(workspace, plan, PlanDistillation(student="/s", teacher="/t", prompts=["1+1=?"]))
    plan_file, arguments_file = (workspace.plans / f"plan-1{suffix}" for suffix in (".json", ".arguments"))
    artifact = workspace.artifacts_of("model") / "model-1"
    artifact.mkdir()
    made = ArtifactRecord(artifact_id="model-1", kind="model", key="k", created_at=record.created_at, bytes=1)
    (artifact / "artifact.json").write_text(made.to_json(), encoding="utf-8")
    checkpoint = root / "checkpoint.json"
    sealed = CheckpointRecord(
        fingerprint="f", state=LoopState(step=3, micro_batch_tokens=10, parts={"a": 1.0}), journal_position=3,
        threads=1, torch="2.11", device="cpu", files={"model.safetensors": "0" * 64},
    ).sealed()  # fmt: skip
    checkpoint.write_text(sealed.to_json(), encoding="utf-8")
    return [
        Target("run.json", run / "run.json", damaged_seal, lambda: read_record(run)),
        Target("journal.jsonl", journal, damaged_journal, look),
        Target("plan", plan_file, damaged_json, lambda: read_plan(workspace, "plan-1")),
        Target("plan's arguments", arguments_file, damaged_json, lambda: read_arguments(workspace, plan)),
        Target("artifact.json", artifact / "artifact.json", damaged_seal, lambda: read_artifact(artifact)),
        Target(
            "checkpoint.json", checkpoint, damaged_seal,
            lambda: checkpoint_record(checkpoint),
        ),
    ]  # fmt: skip


def checkpoint_record(file: Path) -> CheckpointRecord:
    """The record as a resuming training reads it."""
    try:
        return CheckpointRecord.from_json(file.read_bytes())
    except ValidationError as error:
        raise IntegrityError("damaged_file", first_problem(error), fix="Use the checkpoint before.") from error


def outcome(target: Target) -> str:
    """`read`, an OpdError's code, or `PROBLEM` with the traceback."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS_A_FILE)
    try:
        target.read()
        return "read"
    except OpdError as error:
        return error.code
    except BaseException:
        return f"PROBLEM {traceback.format_exc()[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def too_slow(*_: object) -> None:
    raise TooSlow(f"over {SECONDS_A_FILE} s")


def fuzzed(files: int, seed: int, folder: Path) -> dict[str, Any]:
    """The counts of all outcomes, and the problems; each damaged file replaces the sound one while it is read."""
    targets = [*data_targets(folder), *model_targets(folder), *cache_targets(folder), *workspace_targets(folder)]
    sound = {target.name: target.file.read_bytes() for target in targets}
    for target in targets:
        assert outcome(target) == "read", (target.name, outcome(target))
    target_of_journal = next(target for target in targets if target.name == "journal.jsonl")
    target_of_journal.file.write_bytes(sound["journal.jsonl"])
    counts: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
    problems: list[dict[str, Any]] = []
    for number in range(files):
        target = targets[number % len(targets)]
        target.file.write_bytes(target.damage(random.Random(f"{seed}/{number}"), sound[target.name]))
        found = outcome(target)
        counts[target.name][found.split(" ", 1)[0]] += 1
        if found.startswith("PROBLEM"):
            problems.append({"file": target.name, "number": number, "what": found})
        target.file.write_bytes(sound[target.name])
    return {"counts": {name: dict(sorted(count.items())) for name, count in counts.items()}, "found": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, too_slow)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzzed(given.files, given.seed, Path(folder))
    found = report.pop("found")
    for problem in found[:20]:
        print(f"{problem['file']} (number {problem['number']}): {problem['what']}", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "darwin" else 1 << 10)
    report |= {"files": given.files, "seed": given.seed, "problems": len(found), "peak_mib": peak}
    report["seconds"] = round(time.monotonic() - started, 1)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    sys.exit(int(bool(found)))


if __name__ == "__main__":
    main()
