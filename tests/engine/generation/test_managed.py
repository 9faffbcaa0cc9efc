"""A whole build on an engine that is started for it, and killed in the middle: the same rows, and no process left."""

import importlib.util
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from opd_mcp.engine.cache.manifest import read_record, read_rollouts
from opd_mcp.engine.context import EngineAddress, SilentReporter
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine, marked

STAND_IN = Path(__file__).resolve().parents[2] / "stand_ins" / "stand_in_engine.py"
ROWS, SHARD = 12, 4


class Killing(SilentReporter):
    """Kills a process of the engine once so many rows are drawn."""

    def __init__(self, run: Path, after: int) -> None:
        self.run, self.after, self.told = run, after, []

    def progress(self, done: int, total: int, unit: str) -> None:
        if unit == "rollouts" and done >= self.after and not self.told:
            [server] = [pid for pid in marked(self.run) if "--port" in psutil.Process(pid).cmdline()[-40:]]
            os.kill(server, signal.SIGKILL)
            self.told.append("killed")

    def alert(self, code: str, message: str) -> None:
        self.told.append(code)


def test_an_api_server_killed_in_the_middle_changes_no_row(build, tmp_path):
    program, run = tmp_path / "vllm", tmp_path / "run"
    command = [sys.executable, str(STAND_IN)]
    program.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\nos.execv({command[0]!r}, [*{command!r}, *sys.argv[1:]])\n"
    )
    program.chmod(0o755)
    run.mkdir()
    reporter = Killing(run, after=6)

    @contextmanager
    def start_engine(wish):
        managed = ManagedEngine(
            EngineProgram(wish.kind, str(program), tmp_path / "caches", on_gpu=False),
            EngineModel(wish.model, wish.dtype, wish.length, wish.topk),
            run,
            EngineSettings(start_seconds=100),
            reporter.should_stop,
            reporter.alert,
        )
        with managed.running():
            yield EngineAddress(managed.url, managed.key, wish.dtype, managed=True, check=managed.check)

    sizes = {"count": ROWS, "shard_rows": SHARD, "engine": "vllm"}
    section = build.recipe.rollout.model_copy(update=sizes)
    context = replace(build.context(reporter=reporter), start_engine=start_engine)
    killed = build.rollouts("killed", recipe=section, context=context)
    assert reporter.told == ["killed", "engine_restarted"]
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
