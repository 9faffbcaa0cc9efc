"""A whole build on engines that are started for it, one killed in the middle: the same rows, and no process left."""

import importlib.util
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from opd_mcp.engine.cache.manifest import read_cache, read_record, read_rollouts
from opd_mcp.engine.context import EngineAddress, SilentReporter
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine, free_ports, marked, side_by_side
from opd_mcp.worker.held_engine import HeldEngine

STAND_IN = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"
ROWS, SHARD = 12, 4
RESTART_SECONDS = 60.0


class Killing(SilentReporter):
    """Kills the API server of the first of some engines once so many rows are drawn, and waits for its restart."""

    def __init__(self, run: Path, after: int) -> None:
        self.run, self.after, self.told = run, after, []

    def progress(self, done: int, total: int, unit: str) -> None:
        if unit == "rollouts" and done >= self.after and not self.told:
            [server] = [pid for pid in marked(self.run, 0) if "--port" in psutil.Process(pid).cmdline()[-40:]]
            others = marked(self.run, 1)
            os.kill(server, signal.SIGKILL)
            self.told.append("killed")
            deadline = time.monotonic() + RESTART_SECONDS
            while "engine_restarted" not in self.told:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert marked(self.run, 1) == others, "the other engine was left alone"

    def alert(self, code: str, message: str) -> None:
        self.told.append(code)


def starting(tmp_path: Path, reporter: SilentReporter, count: int = 1):
    """A run's directory, and what starts so many stand-ins of vLLM for it."""
    program, run = tmp_path / "vllm", tmp_path / "run"
    command = [sys.executable, str(STAND_IN)]
    program.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\nos.execv({command[0]!r}, [*{command!r}, *sys.argv[1:]])\n"
    )
    program.chmod(0o755)
    run.mkdir()

    @contextmanager
    def start_engine(wish):
        engines = [
            ManagedEngine(
                EngineProgram(wish.kind, str(program), tmp_path / "caches", on_gpu=False),
                EngineModel(wish.model, wish.dtype, wish.length, wish.topk),
                run,
                EngineSettings(start_seconds=100),
                reporter.should_stop,
                reporter.alert,
                port=port,
                number=number,
            )
            for number, port in enumerate(free_ports(count))
        ]
        with side_by_side(engines):
            yield [EngineAddress(one.url, one.key, wish.dtype, managed=True, check=one.check) for one in engines]

    return run, start_engine


@pytest.mark.parametrize("count", [1, 2])
def test_an_api_server_killed_in_the_middle_changes_no_row(build, tmp_path, count):
    reporter = Killing(tmp_path / "run", after=6)
    run, start_engine = starting(tmp_path, reporter, count)
    sizes = {"count": ROWS, "shard_rows": SHARD, "engine": "vllm"}
    section = build.recipe.rollout.model_copy(update=sizes)
    context = replace(build.context(reporter=reporter), start_engine=start_engine)
    killed = build.rollouts("killed", recipe=section, context=context)
    assert reporter.told[:2] == ["killed", "engine_restarted"]
    assert set(reporter.told[2:]) <= {"engine_lost"}, "only of several engines one can be lost"
    assert len(reporter.told) == 2 or count > 1
    assert marked(run) == []
    spec = importlib.util.spec_from_file_location("stand_in_engine", STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wire = module.Wire(build.student.name, module.model_answers(build.student)).serve_in_background()
    try:
        whole = build.rollouts("whole", recipe=section.model_copy(update={"engine": wire.url}))
    finally:
        wire.close()
    ours, theirs = read_rollouts(killed), read_rollouts(whole)
    assert np.array_equal(ours.response_ids, theirs.response_ids)
    assert np.array_equal(ours.columns["behaviour_logprobs"], theirs.columns["behaviour_logprobs"])
    assert [shard.sha256 for shard in read_record(killed).shards] == [s.sha256 for s in read_record(whole).shards]
    assert (read_record(killed).generated_by.managed, read_record(killed).generated_by.dtype) == (True, "float32")


def test_one_engine_draws_and_scores_where_the_student_is_its_own_teacher(build, tmp_path):
    run, start_engine = starting(tmp_path, SilentReporter())
    started = []

    @contextmanager
    def counted(wish):
        started.append(wish)
        with start_engine(wish) as addresses:
            yield addresses

    engine = HeldEngine(counted)
    context = replace(build.context(), start_engine=engine.serving)
    own = replace(build, student=build.teacher)
    section = build.recipe.rollout.model_copy(update={"count": ROWS, "shard_rows": SHARD, "engine": "vllm"})
    engine.begin(["vllm", "vllm", None])
    drawn = own.rollouts("drawn", recipe=section, context=context)
    assert len(marked(run)) > 0, "it waits for the scores"
    engine.begin(["vllm", None])
    cache = own.cache(drawn, "cache", recipe=own.scoring(engine="vllm"), context=context, allow_teacher_mismatch=True)
    assert (len(started), marked(run)) == (1, [])
    rows = read_cache(cache)[1]
    gap = np.abs(rows.columns["teacher_logprobs"] - rows.columns["behaviour_logprobs"]).max()
    assert gap <= 1e-4, "the model agrees with itself"
