"""Every reader of files that others may have written, given mutated files: it reads, or raises an OpdError.

Run: `python tools/fuzz_readers.py [--rounds 400] [--seed 0]`. Each round mutates one good file (bits flipped, cut off,
doubled, pieces repeated, numbers made huge, brackets nested, bytes that are no UTF-8) and reads it. What is found is
printed as JSON: cases and OpdErrors by reader, and every other exception with the seed of its case. Exit status 1 when
there is one.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.identity.data import read_prompts, read_responses_header
from opd_mcp.identity.lineage import LINEAGE_FILE, read_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.jobs.cache_view import read_manifest
from opd_mcp.jobs.service import JobService
from opd_mcp.jobs.settings import JobSettings
from opd_mcp.schemas.cache import CacheManifest, RolloutStatistics, ScoreStatistics, Shard
from opd_mcp.schemas.errors import OpdError
from opd_mcp.schemas.identity import Lineage
from opd_mcp.schemas.recipes import Sampling
from opd_mcp.schemas.requests import PlanDistillation, StartDistillation
from opd_mcp.store.journal import JournalRecord, encode_record, read_journal, utc_now
from opd_mcp.store.plans import read_plan
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.runs import read_record
from opd_mcp.store.view import RunView
from opd_mcp.store.workspace import Workspace

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
NESTED = b"[" * 50_000
HUGE = (b"9" * 30, b"-1", b"1e999", b"18446744073709551616", b"NaN", b"0.5", b"null", b'"x"', b"{}")


@dataclass(frozen=True)
class Target:
    """A good file, and what reads it."""

    name: str
    file: Path
    read: Callable[[], object]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three faults."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(MUTATIONS)(content, rng)
    return content


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8) if content else 0):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _place(content: bytes, rng: random.Random) -> int:
    # Headers and footers say what the rest is, so they are hit more often than their size would have it.
    near = min(len(content), 256)
    return rng.choice([rng.randrange(len(content)), rng.randrange(near), len(content) - 1 - rng.randrange(near)])


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _doubled(content: bytes, rng: random.Random) -> bytes:
    begin = rng.randint(0, len(content))
    piece = content[begin : begin + rng.randint(0, 4096)]
    return content[:begin] + piece * rng.randint(2, 20) + content[begin:]


def _other_number(content: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content[:200_000]))
    if not numbers:
        return content
    chosen = rng.choice(numbers)
    return content[: chosen.start()] + rng.choice(HUGE) + content[chosen.end() :]


def _other_value(content: bytes, rng: random.Random) -> bytes:
    values = list(re.finditer(rb'"[^"\\]{0,80}"', content[:200_000]))
    if not values:
        return content
    chosen = rng.choice(values)
    other = rng.choice([b"null", b"[]", b"7", b'""', b'"\\ud800"', b'"../../x"', b"true"])
    return content[: chosen.start()] + other + content[chosen.end() :]


def _nested(content: bytes, rng: random.Random) -> bytes:
    begin = rng.randint(0, len(content))
    return content[:begin] + NESTED + content[begin:]


def _no_text(content: bytes, rng: random.Random) -> bytes:
    begin = rng.randint(0, len(content))
    return content[:begin] + rng.randbytes(rng.randint(1, 64)) + content[begin:]


MUTATIONS = (_flipped, _cut, _doubled, _other_number, _other_value, _nested, _no_text)


def targets(folder: Path) -> list[Target]:
    """One good file of each kind below `folder`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = Path(shutil.copytree(EXAMPLE / "student", folder / "model"))
    (model / LINEAGE_FILE).write_text(
        Lineage(kind="model", stage="sft", recipe={}, model=inspect_model(model).identity).to_json()
    )
    rows = [{"id": str(i), "prompt": f"{i}+1=?", "answer": str(i + 1), "response": "1"} for i in range(40)]
    jsonl, parquet = folder / "rows.jsonl", folder / "rows.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    workspace = Workspace(folder / "home")
    # Its worker ends at once, which leaves a real plan and a real run.json.
    settings = JobSettings(lease_folder=folder / "leases", cpu_slots=1, worker_command=("true",))
    service = JobService(workspace, AllowedRoots([folder]), settings)
    prompts = {"student": str(model), "teacher": str(EXAMPLE / "teacher"), "prompts": ["1+1=?"] * 4, "preset": "demo"}
    plan = service.plan(PlanDistillation.model_validate(prompts))
    run_id = service.start_distillation(StartDistillation(plan_id=plan.plan_id)).run_id
    run, plan_file = workspace.run(run_id), workspace.plans / f"{plan.plan_id}.json"
    data: list[tuple[Any, dict[str, Any]]] = [
        ("state", {"state": "queued"}),
        ("state", {"state": "running"}),
        ("phase", {"phase": "sft", "event": "started"}),
        ("metric", {"step": 1, "values": {"loss": 1.5}}),
        ("progress", {"done": 1, "total": 3, "unit": "steps"}),
        ("alert", {"code": "slow", "message": "It is slow."}),
        ("error", {"code": "bad_number", "cause": "c", "fix": "f", "log_tail": []}),
        ("state", {"state": "failed"}),
    ]
    journal = run / "journal.jsonl"
    journal.write_bytes(
        b"".join(encode_record(JournalRecord(i, 1, utc_now(), *pair)) for i, pair in enumerate(data, 1))
    )
    cache = folder / "cache"
    cache.mkdir()
    identity = inspect_model(model).identity
    manifest = CacheManifest(
        teacher=identity,
        behaviour=identity,
        prompts_sha256="0" * 64,
        sampling=Sampling(),
        seed=0,
        eos_token_ids=[1],
        topk=0,
        dtype="float32",
        vocab_size=24,
        shards=[Shard(file="shard-00000.parquet", rows=1, tokens=2, prompt_tokens=2, sha256="0" * 64)],
        rollouts=RolloutStatistics(
            rows=1,
            response_tokens=2,
            mean_response_tokens=2.0,
            truncated_fraction=0.0,
            eos_fraction=1.0,
            empty_responses=0,
            duplicate_rows=0,
        ),
        scores=ScoreStatistics(mean_teacher_logprob=-1.0),
    )
    (cache / "manifest.json").write_text(manifest.to_json())
    found = [Target(f"model/{name}", model / name, lambda: inspect_model(model)) for name in MODEL_FILES]
    return [
        *found,
        Target("lineage", model / LINEAGE_FILE, lambda: read_lineage(model)),
        Target("prompts.jsonl", jsonl, lambda: read_prompts(jsonl)),
        Target("responses.jsonl", jsonl, lambda: read_responses_header(jsonl)),
        Target("prompts.parquet", parquet, lambda: read_prompts(parquet)),
        Target("responses.parquet", parquet, lambda: read_responses_header(parquet)),
        Target("journal", journal, lambda: read_journal(journal)),
        Target("journal view", journal, lambda: RunView(run).refresh()),
        Target("run.json", run / "run.json", lambda: read_record(run)),
        Target("plan", plan_file, lambda: read_plan(workspace, plan.plan_id)),
        Target("manifest", cache / "manifest.json", lambda: read_manifest(cache)),
    ]


MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def fuzz(rounds: int, seed: int) -> dict[str, Any]:
    """`rounds` mutated files for each reader."""
    errors: Counter[str] = Counter()
    crashes: dict[str, str] = {}
    cases, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        for target in targets(Path(name)):
            good = target.file.read_bytes()
            for number in range(rounds):
                case = f"{target.name} {seed} {number}"
                target.file.write_bytes(mutated(good, random.Random(case)))
                started = time.process_time()
                try:
                    target.read()
                except OpdError as error:
                    errors[f"{target.name}: {error.code}"] += 1
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    told = f"{type(error).__name__} at {place.name}:{place.lineno}: {str(error)[:100]}"
                    crashes.setdefault(f"{target.name}: {told}", case)
                slowest = max(slowest, time.process_time() - started)
                cases += 1
            target.file.write_bytes(good)
    return {"cases": cases, "slowest_s": round(slowest, 3), "errors": dict(errors), "crashes": crashes}


def main() -> int:
    """Fuzz, print, and say by the exit status whether something else than an OpdError was raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = fuzz(arguments.rounds, arguments.seed)
    print(json.dumps(found, indent=2))
    return int(bool(found["crashes"]))


if __name__ == "__main__":
    sys.exit(main())
