"""Builds one cache with a local teacher and one over HTTP, and prints how far apart they are.

Run: `python tools/bench/http_teacher.py [--rows 512]`. It starts `opd-mcp serve-teacher` on the example's teacher in
its own process, and prints one JSON line.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine import stages
from opd_mcp.engine.cache.manifest import read_cache
from opd_mcp.engine.context import Context, RolloutInputs, ScoreInputs
from opd_mcp.identity.consistency import asserted_claim
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.identity import RemoteTeacher
from opd_mcp.schemas.resolve import resolve_recipe
from tools import EXAMPLE


def main(rows: int) -> None:
    """Print one JSON line."""
    key = secrets.token_urlsafe(16)
    command = [sys.executable, "-m", "opd_mcp.cli", "serve-teacher", str(EXAMPLE / "teacher"), "--port", "0"]
    server = subprocess.Popen(command, env={**os.environ, "OPD_TEACHER_KEY": key}, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None, "the server did not start"
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(compared(Path(folder), RemoteTeacher(name="teacher", url=found.group()), key, rows)))
    finally:
        server.terminate()
        server.wait()


def compared(folder: Path, remote: RemoteTeacher, key: str, rows: int) -> dict[str, float]:
    """The largest differences in nats, and the seconds of both builds."""
    recipe = resolve_recipe("demo", {"rollout.count": rows, "rollout.shard_rows": 128, "score.topk": 8})
    teacher, student = EXAMPLE / "teacher", EXAMPLE / "student"
    context = Context(recipe.runtime, recipe.prompting, teacher_key=key)
    stages.rollout(
        recipe.rollout, RolloutInputs(student=student, prompts=EXAMPLE / "opd.jsonl"), folder / "rollouts", context
    )
    answer: dict[str, float] = {"rows": rows}
    for name, where in (("local", {"teacher": teacher}), ("http", {"remote": remote})):
        started = time.perf_counter()
        claim = asserted_claim(inspect_model(teacher).identity)
        inputs = ScoreInputs(student=student, rollouts=folder / "rollouts", sft_teacher=claim, **where)
        stages.score(recipe.score, inputs, folder / name, context)
        answer[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
    (_, local), (_, http) = read_cache(folder / "local"), read_cache(folder / "http")
    answer["tokens"] = len(local.response_ids)
    for column in ("teacher_logprobs", "topk_logprobs"):
        difference = np.abs(local.columns[column].astype(np.float64) - http.columns[column].astype(np.float64))
        answer[f"largest_difference_{column}"] = float(difference.max())
    answer["same_topk_ids"] = float((local.columns["topk_ids"] == http.columns["topk_ids"]).mean())
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    main(parser.parse_args().rows)
