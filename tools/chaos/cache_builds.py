"""Kills cache builds with SIGKILL at moments spread over rollouts and scoring, and resumes each in a new process.

`python tools/chaos/cache_builds.py --points 20` prints one JSON line: every content hash must equal the uninterrupted
build's, and no finished shard may be made twice. Each build runs in a forked child, so that torch is imported once. A
moment is a random fraction of a shard's time after a given number of finished shards.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, RolloutInputs, ScoreInputs
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.resolve import resolve_recipe
from tools import EXAMPLE

SHORT = {"rollout.count": 12, "rollout.shard_rows": 2, "rollout.sampling.max_new_tokens": 12, "score.topk": 4}

SHARDS = 12  # six of rollouts, six of scores


def build(folder: Path) -> None:
    """Build or resume rollouts and cache."""
    recipe = resolve_recipe("demo", SHORT)
    context = Context(recipe.runtime, recipe.prompting)
    teacher, student, prompts = EXAMPLE / "teacher", EXAMPLE / "student", EXAMPLE / "opd.jsonl"
    claim = asserted_claim(inspect_model(teacher).identity)
    rollouts = folder / "rollouts"
    stages.rollout(recipe.rollout, RolloutInputs(student=student, prompts=prompts), rollouts, context)
    stages.score(
        recipe.score,
        ScoreInputs(teacher=teacher, student=student, rollouts=rollouts, sft_teacher=claim),
        folder / "cache",
        context,
    )


def in_child(folder: Path, kill_at: int | None, delay: float = 0.0) -> bool:
    """Whether the build ended by itself; otherwise it was killed `delay` seconds after `kill_at` finished shards."""
    child = os.fork()
    if child == 0:
        build(folder)
        os._exit(0)
    if kill_at is not None:
        running = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while len(finished_shards(folder)) < kill_at and os.waitid(os.P_PID, child, running) is None:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        return True
    return False


def finished_shards(folder: Path) -> dict[str, int]:
    """The modification time in ns of each shard that has its completion note."""
    notes = [note for note in folder.glob("*/*.done.json") if not note.name.startswith(".")]
    shards = [note.with_name(note.name.removesuffix(".done.json")) for note in notes]
    return {str(shard): shard.stat().st_mtime_ns for shard in shards if shard.exists()}


def content(folder: Path) -> str:
    """The content hash of a finished cache."""
    return CacheManifest.from_json((folder / "cache" / "manifest.json").read_bytes()).content_sha256


def main(root: Path, count: int) -> None:
    """Print the outcome of `count` kills."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    in_child(root / "whole", None)
    shard_seconds = (time.perf_counter() - started) / SHARDS
    contents, killed_in, killed, twice = [content(root / "whole")], [], 0, 0
    rng = random.Random(0)
    for point in range(count):
        folder, kill_at, delay = root / str(point), point * SHARDS // count, rng.random() * shard_seconds
        while in_child(folder, kill_at, delay):  # it ended before the signal: try again, a shard earlier
            folder, kill_at, delay = folder.with_name(f"{folder.name}x"), max(0, kill_at - 1), 0.0
        killed += 1
        killed_in.append("score" if (folder / "rollouts" / "rollouts.json").exists() else "rollout")
        before = finished_shards(folder)
        assert not (folder / "cache" / "lineage.json").exists() or (folder / "cache" / "manifest.json").exists()
        assert in_child(folder, None)
        twice += sum(Path(shard).stat().st_mtime_ns != time for shard, time in before.items())
        contents.append(content(folder))
    print(
        json.dumps(
            {
                "killed": killed,
                "killed_in": sorted(set(killed_in)),
                "points_in_scoring": killed_in.count("score"),
                "contents": contents,
                "shards_made_twice": twice,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), parser.parse_args().points)
