"""A worker's engine: started again when it ends, and ended with every process, however the worker dies."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from opd_mcp.devices import hardware
from opd_mcp.devices.environment import engine_environment
from opd_mcp.devices.hardware import Gpu
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.planning.engines import vllm_command
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.store.journal import JournalWriter
from opd_mcp.store.store import Store
from opd_mcp.store.workspace import Workspace, read_settings
from opd_mcp.worker import engines, run_devices
from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine, marked, side_by_side
from opd_mcp.worker.main import RunWorker, WorkerSettings
from opd_mcp.worker.run_devices import device_groups

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
STAND_IN = Path(__file__).resolve().parents[1] / "stand_ins" / "stand_in_engine.py"
DEADLINE_SECONDS = 60.0


@pytest.fixture
def program(tmp_path) -> str:
    """A `vllm` that is the stand-in without a model."""
    file = tmp_path / "vllm"
    file.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\nsys.argv[0] = {str(STAND_IN)!r}\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv])\n"
    )
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def engine(program, tmp_path, monkeypatch):
    """`engine(**settings)`: the stand-in for one run, not yet started; alerts are in its `told`."""
    monkeypatch.setenv("VLLM_STAND_IN", "quick")
    monkeypatch.setattr(engines, "HEALTH_SECONDS", 0.3)
    run = tmp_path / "run"
    run.mkdir()

    def made(*, reloads: bool = False, **settings) -> ManagedEngine:
        told: list[tuple[str, str]] = []
        managed = ManagedEngine(
            EngineProgram("vllm", program, tmp_path / "caches", on_gpu=False),
            EngineModel(EXAMPLE / "teacher", "float32", 100, reloads=reloads),
            run,
            EngineSettings(start_seconds=30, **settings),
            lambda: False,
            lambda code, message: told.append((code, message)),
        )
        managed.told = told
        return managed

    yield made
    assert marked(run) == [], "no process is left"


def command_of(pid: int) -> list[str]:
    return psutil.Process(pid).cmdline()


def until(condition) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def role_of(pid: int) -> str:
    words = psutil.Process(pid).cmdline()
    return "keeper" if words[3:4] == [engines.__file__] else "core" if "core" in words else "server"


def processes(run: Path) -> dict[str, int]:
    return {role_of(pid): pid for pid in marked(run)}


def test_it_answers_with_its_key_alone_and_leaves_no_process(engine):
    managed = engine()
    with managed.running():
        assert managed._health() == 200
        assert set(processes(managed.run)) == {"keeper", "server", "core"}
        command = psutil.Process(processes(managed.run)["server"]).cmdline()
        assert managed.key not in command
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[command.index("--max-model-len") + 1] == "101"
    assert managed._health() == 0


@pytest.mark.parametrize("killed", ["server", "core", "keeper"])
def test_whichever_process_is_killed_all_are_ended_and_it_is_started_again(engine, killed):
    managed = engine()
    with managed.running():
        before = processes(managed.run)
        os.kill(before[killed], signal.SIGKILL)
        until(lambda: managed.restarts == 1 and managed._health() == 200 and len(processes(managed.run)) == 3)
        assert not set(before.values()) & set(processes(managed.run).values())
        managed.check()
    assert [code for code, _ in managed.told] == ["engine_restarted"]


def test_one_that_is_killed_while_it_starts_is_started_again(engine, program, tmp_path):
    """As the kernel does for want of memory; one that ends by itself is told at once."""
    managed, once = engine(), tmp_path / "killed"
    text = Path(program).read_text()
    dying = (
        f"if not os.path.exists({str(once)!r}):\n    open({str(once)!r}, 'w').close()\n    os.kill(os.getpid(), 9)\n"
    )
    Path(program).write_text(text.replace("os.execv", f"{dying}\nos.execv"))
    with managed.running():
        assert managed._health() == 200
    [(code, message)] = managed.told
    assert code == "engine_restarted"
    assert "is started again (1 of 3 times in this phase): it was killed before it answered. Rows" in message
    once.unlink()
    managed = engine(restarts=0)
    with pytest.raises(ResourceError, match=r"engine_failed.*killed before it answered, after 0"), managed.running():
        pass


def test_one_that_ends_again_and_again_is_one_error(engine):
    managed = engine(restarts=0)
    with managed.running():
        os.kill(processes(managed.run)["server"], signal.SIGKILL)
        until(lambda: managed.failure is not None)
        with pytest.raises(ResourceError, match=r"engine_failed.*after 0 restarts"):
            managed.check()


def test_one_that_does_not_start_is_told_at_once(engine, program):
    managed = engine()
    Path(program).write_text(f"#!{sys.executable} -IS\nraise SystemExit('no such model')\n")
    with (
        pytest.raises(ResourceError, match=r"engine_failed.*ended with status 1 before it answered"),
        managed.running(),
    ):
        pass


def test_of_several_each_is_ended_and_started_again_alone(engine):
    first, second = engine(), engine()
    second.number, second.told = 1, first.told
    with side_by_side([first, second]):
        assert len(marked(first.run)) == 6
        before = marked(first.run, 1)
        os.kill(marked(first.run, 0)[0], signal.SIGKILL)
        until(lambda: first.restarts == 1 and first._health() == 200)
        assert (second.restarts, marked(first.run, 1)) == (0, before)
    assert [code for code, _ in first.told] == ["engine_restarted"]


def test_a_run_has_an_engine_per_device_as_its_settings_name_it(program, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_STAND_IN", "quick")
    workspace = Workspace(tmp_path / "home")
    (workspace.root / "settings.toml").write_text(f'[engines]\nvllm = "{program}"\n')
    run, model = workspace.run("a-run"), EngineModel(EXAMPLE / "teacher", "float32", 100)
    run.mkdir()
    with JournalWriter(run / "journal.jsonl", 1) as journal:
        worker = RunWorker(Store(workspace), run, journal, WorkerSettings(LeaseFolder(tmp_path / "leases", 2)))
        both = worker._engines("vllm", model, "cpu", [None, None])
        with side_by_side(both):
            assert [(one._health(), len(marked(run, one.number))) for one in both] == [(200, 3), (200, 3)]
            assert len({one.key for one in both} | {one.url for one in both}) == 4
        assert len(worker._engines("vllm", model, "cpu", [])) == 1
    assert marked(run) == []


def test_one_takes_new_weights_in_place_and_is_started_on_them_when_it_ends(engine):
    served = engine(reloads=True)
    with served.running():
        before = marked(served.run)
        assert served.reload(EXAMPLE / "student")
        assert not served.reload(EXAMPLE / "nowhere"), "the core says that it has not got them"
        assert served.reload(EXAMPLE / "student")
        assert (marked(served.run), served.restarts) == (before, 0)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: served.restarts == 1 and served._health() == 200)
        [command] = [line for line in map(command_of, marked(served.run)) if "--port" in line[-40:] and "serve" in line]
        assert str(EXAMPLE / "student") in command
        assert command[command.index("--served-model-name") + 1] == "teacher", "whoever asks knows it by this name"


def test_one_that_was_not_started_for_it_takes_no_weights(engine):
    served = engine()
    with served.running():
        assert not served.reload(EXAMPLE / "student")


def test_one_that_does_not_start_ends_the_others(engine, program, tmp_path):
    good, bad = engine(), engine()
    broken = tmp_path / "broken"
    broken.write_text(f"#!{sys.executable} -IS\nraise SystemExit('no such model')\n")
    broken.chmod(0o755)
    bad.program, bad.number = replace(bad.program, program=str(broken)), 1
    with pytest.raises(ResourceError, match=r"engine_failed.*status 1"), side_by_side([good, bad]):
        pass


def test_a_gpu_each_where_the_model_fits_it_else_one_engine_on_all(tmp_path, monkeypatch):
    def visible(free: int):
        gpus = [Gpu(f"GPU-{name}", "H", total_memory=80 << 30, free_memory=free) for name in "ab"]
        for module in (hardware, run_devices):
            monkeypatch.setattr(module, "gpus", lambda: gpus)

    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    devices = ["GPU-a", "GPU-b"]
    visible(40 << 30)
    assert device_groups(tmp_path, devices, True) == [("GPU-a",), ("GPU-b",)]
    visible(3 << 30)
    assert device_groups(tmp_path, devices, True) == [("GPU-a", "GPU-b")]
    assert device_groups(tmp_path, [None, None], False) == [(), ()]
    assert device_groups(tmp_path, [], True) == [()]
    model = EngineModel(EXAMPLE / "teacher", "float32", 10)
    one, both = (EngineProgram("vllm", "/v/vllm", tmp_path, True, group) for group in (("GPU-b",), tuple(devices)))
    assert one.environment({}, tmp_path, "k")["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert "--tensor-parallel-size" not in one.command(model, 7)
    command = both.command(model, 7)
    assert command[command.index("--tensor-parallel-size") + 1] == "2"
    visible(20 << 30)
    shares = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}
    for kind, share in shares.items():
        command = replace(both, kind=kind).command(model, 7)
        shares[kind] = command[command.index(share) + 1]
    assert shares == {"vllm": "0.20", "sglang": "0.80"}, "of all memory, and of what is free"
    assert replace(both, kind="sglang").command(model, 7)[-5:-3] == ["--tp-size", "2"]


OWNER = """
import sys, time
from pathlib import Path
from opd_mcp.schemas.runs import EngineSettings
from opd_mcp.worker.engines import EngineModel, EngineProgram, ManagedEngine
program, model, run = sys.argv[1:]
engine = ManagedEngine(EngineProgram("vllm", program, Path(run) / "caches", False),
    EngineModel(Path(model), "float32", 100), Path(run), EngineSettings(), lambda: False, print)
with engine.running():
    print("running", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("point", ["starting", "running"])
def test_a_killed_worker_leaves_no_process(program, tmp_path, point):
    run = tmp_path / "run"
    run.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, program, str(EXAMPLE / "teacher"), str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_STAND_IN": "quick", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if point == "running":
        assert owner.stdout.readline() == "running\n"
    else:
        until(lambda: marked(run))
    owner.kill()
    owner.wait()
    until(lambda: marked(run) == [])


def test_what_outlived_worker_and_keeper_is_ended_by_the_next_attempt(engine, tmp_path):
    managed = engine()
    orphan = subprocess.Popen(
        [sys.executable, "-IS", "-c", "import time; time.sleep(600)"],
        env={engines.MARK: str(managed.run)},
        start_new_session=True,
    )
    until(lambda: marked(managed.run) == [orphan.pid])
    with managed.running():
        assert orphan.wait(10) == -signal.SIGKILL


def test_an_engine_inherits_no_secret_and_nothing_of_this_python():
    given = {"PATH": "/bin", "OPD_TEACHER_KEY": "k", "HF_TOKEN": "t", "PYTHONPATH": "/x", "VLLM_CPU_KVCACHE_SPACE": "4"}
    assert engine_environment(given) == {"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "4"}


def test_a_process_that_gives_itself_a_title_keeps_its_mark(tmp_path):
    """setproctitle, which vLLM's cores call, else writes over the environment that `marked` reads."""
    program = EngineProgram("vllm", "/opt/bin/vllm", tmp_path, on_gpu=False)
    environment = program.environment({}, tmp_path / "run", "key")
    assert (environment["SPT_NOENV"], environment[engines.MARK]) == ("1", str(tmp_path / "run"))


def test_settings_name_engines_and_nothing_else(tmp_path):
    workspace = Workspace(tmp_path / "home")
    (workspace.root / "settings.toml").write_text('[engines]\nvllm = "/opt/vllm/bin/vllm"\nrestarts = 1\n')
    found = read_settings(workspace).engines
    assert (found.program("vllm"), found.program("sglang"), found.restarts) == ("/opt/vllm/bin/vllm", None, 1)
    (workspace.root / "settings.toml").write_text('[engines]\nvlm = "/opt/vllm"\n')
    with pytest.raises(ArgumentError, match=r"unknown_setting.*engines\.vlm.*engines\.vllm"):
        read_settings(workspace)


def test_a_python_starts_vllm_as_a_module_and_sglang_is_told_to_be_deterministic(tmp_path):
    model = EngineModel(EXAMPLE / "teacher", "bfloat16", 10, topk=32)
    python, command = tmp_path / "bin" / "python", tmp_path / "bin" / "vllm"
    python.parent.mkdir()
    assert vllm_command(str(command)) == (str(command), "serve")
    python.touch(mode=0o755)
    assert vllm_command(str(command)) == vllm_command(str(python)), "the CPU build's own command does not start"
    (tmp_path / "lib" / "python3.11" / "site-packages" / "vllm-0.32.0.dist-info").mkdir(parents=True)
    assert vllm_command(str(command)) == (str(command), "serve")
    vllm = EngineProgram("vllm", str(python), tmp_path, on_gpu=False).command(model, 7)
    assert vllm[:3] == [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    assert vllm[vllm.index("--max-logprobs") + 1] == "32"
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(vllm)
    sglang = EngineProgram("sglang", "/opt/bin/python", tmp_path, on_gpu=True).command(model, 7)
    assert {"--enable-deterministic-inference", "--mem-fraction-static", "--disable-radix-cache"} <= set(sglang)
    assert json.loads((EXAMPLE / "teacher" / "config.json").read_text())["max_position_embeddings"] >= 64


def test_sglang_on_a_cpu_is_given_what_it_runs_with_there(tmp_path):
    """Seen in 0.5.23: no deterministic inference, a cache that takes the memory, 6 tokens of the context kept."""
    program = EngineProgram("sglang", "/opt/bin/python", tmp_path, on_gpu=False)
    command = program.command(EngineModel(EXAMPLE / "teacher", "float32", 100), 7)
    said = dict(pairwise(command))
    assert (said["--device"], said["--attention-backend"]) == ("cpu", "torch_native")
    assert said["--context-length"] == "107"
    assert said["--max-total-tokens"] == str((1 << 30) // (3 * 2 * 96 * 4)), "a gibibyte of keys and values"
    assert "--enable-deterministic-inference" not in command
    assert program.environment({}, tmp_path, "k")["SGLANG_USE_CPU_ENGINE"] == "1"


def test_sglang_is_given_its_key_where_no_other_user_reads_it(tmp_path):
    """A package `sglang` in place of the real one tells its arguments."""
    server = tmp_path / "sglang" / "launch_server.py"
    server.parent.mkdir()
    server.write_text("import json, sys\nprint(json.dumps([__name__, *sys.argv[1:]]))\n")
    program = EngineProgram("sglang", sys.executable, tmp_path, on_gpu=False)
    command = program.command(EngineModel(EXAMPLE / "teacher", "float32", 100), 7)
    environment = program.environment(os.environ, tmp_path, "the-key") | {"PYTHONPATH": str(tmp_path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == ["__main__", *command[2:], "--api-key", "the-key"]
    assert "the-key" not in command
