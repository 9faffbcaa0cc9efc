"""Engines that a worker starts: vLLM or SGLang on loopback for the time of a phase, ended with all their processes.

An engine is a tree of processes: an API server, and cores that outlive it. A keeper, this file run alone, is the head
of their process group. It ends the group when the API server ends, and when its pipe from the worker closes, which the
kernel does however the worker dies. Every process also has the run's directory in its environment: what left the group,
or lost its keeper, is found by that, at the latest by the run's next attempt. On several devices there is one engine
per device, each with a keeper and a number of its own.

    worker ── pipe ──► keeper ──► API server ──► cores          end of the worker, keeper or API server: SIGKILL for all
"""

import contextlib
import json
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # the keeper has the standard library only
    from opd_mcp.schemas.errors import OpdError
    from opd_mcp.schemas.runs import EngineSettings

logger = logging.getLogger(__name__)
MARK, NUMBER = "OPD_ENGINE_OF", "OPD_ENGINE_NUMBER"
POLL_SECONDS = 0.2
HEALTH_SECONDS = 5.0
FAILED_LOOKS = 3
END_SECONDS = 20.0
LEAST_LENGTH = 64
MOST_LOGPROBS = 20
SPARE_BYTES = 4 << 30
CPU_CACHE_BYTES = 1 << 30
ENGINE_SIDE = Path(__file__).with_name("engine_side")
GUARD, SGLANG_START = "opd_engine_guard.Guard", ENGINE_SIDE / "opd_sglang_start.py"
SHELLS_SIGNALS = 128  # a shell's status for a command that a signal ended is this and the signal


@dataclass(frozen=True)
class EngineModel:
    """What an engine is to serve: the directory, its dtype, tokens of the longest row, and top tokens per position.

    `room` are the bytes that this process will need on its GPU meanwhile; None: those of the same model. One that
    `reloads` is given other weights of the same shapes later, under the name that it has from the start.
    """

    path: Path
    dtype: str
    length: int
    topk: int = 0
    room: int | None = None
    reloads: bool = False
    name: str = ""

    @property
    def served_name(self) -> str:
        """The name that requests give."""
        return self.name or self.path.name


@dataclass(frozen=True)
class EngineProgram:
    """How an engine is started here: its name, the program, where it may keep caches, and whether it has a GPU.

    `devices` are the GPUs that it computes on, by UUID; of several each holds a part of every tensor. Empty: those that
    this process sees.
    """

    kind: str
    program: str
    caches: Path
    on_gpu: bool
    devices: tuple[str, ...] = ()

    def command(self, model: EngineModel, port: int) -> list[str]:
        """The argument list; what would change log-probs or sampling silently is said explicitly."""
        from opd_mcp.planning.engines import vllm_command
        from opd_mcp.schemas.recipes import SGLANG_KEEPS

        common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", model.dtype]
        common += ["--served-model-name", model.served_name]
        length, many = served_length(model), str(len(self.devices)) if len(self.devices) > 1 else ""
        if self.kind == "sglang":
            memory = ["--enable-deterministic-inference", "--mem-fraction-static"]
            memory.append(f"{memory_share(model, self.devices, of_free=True):.2f}")
            on_cpu = ["--device", "cpu", "--attention-backend", "torch_native"]
            on_cpu += ["--max-total-tokens", str(cached_tokens(model))]
            return [
                *(self.program, str(SGLANG_START), "--model-path", str(model.path), *common, "--random-seed", "0"),
                *("--context-length", str(length + SGLANG_KEEPS), "--disable-radix-cache", "--enable-metrics"),
                *("--log-level", "warning"),  # else it writes its key, and a line a batch, into the run's log
                *(("--tp-size", many) if many else ()),
                *(memory if self.on_gpu else on_cpu),
            ]
        return [
            *(*vllm_command(self.program), str(model.path), *common, "--max-model-len", str(length), "--seed", "0"),
            *("--max-logprobs", str(max(model.topk, MOST_LOGPROBS)), "--logprobs-mode", "raw_logprobs"),
            *("--generation-config", "vllm", "--no-enable-prefix-caching", "--uvicorn-log-level", "warning"),
            *(("--tensor-parallel-size", many) if many else ()),
            *(("--middleware", GUARD) if model.reloads else ()),
            *(
                ("--gpu-memory-utilization", f"{memory_share(model, self.devices):.2f}")
                if self.on_gpu
                # part of a prompt alone makes vLLM 0.32 set back its row's seed, which a CPU's generator cannot
                else ("--enforce-eager", "--no-enable-chunked-prefill")
            ),
        ]

    def environment(self, given: Mapping[str, str], run: Path, key: str, *, reloads: bool = False) -> dict[str, str]:
        """The variables of an engine: no secret but its own key, no network, caches in the workspace."""
        from opd_mcp.devices.environment import engine_environment

        caches = {
            name: str(self.caches / name.lower())
            for name in (
                "HF_HOME",
                "VLLM_CACHE_ROOT",
                "VLLM_CONFIG_ROOT",
                "TORCHINDUCTOR_CACHE_DIR",
                "TRITON_CACHE_DIR",
            )
        }
        # Else a core that gives itself a title overwrites its environment, where the mark is (setproctitle).
        titled = {"SPT_NOENV": "1"}
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        on_cpu = {
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_BYTES >> 30),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "SGLANG_USE_CPU_ENGINE": "1",
        }
        # The path that takes new weights is one of its developers', which its guard closes to all without the key.
        reloading = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ENGINE_SIDE)}
        return {
            **(reloading if reloads and self.kind == "vllm" else {}),
            **({} if self.on_gpu else on_cpu),
            **engine_environment(given),
            **caches,
            **quiet,
            **titled,
            **({"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {}),
            "VLLM_API_KEY" if self.kind == "vllm" else "OPD_ENGINE_KEY": key,
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by what it keeps of its context
            MARK: str(run),
        }


def served_length(model: EngineModel) -> int:
    """The context to ask for: one token more than the longest row, within the positions that the model has."""
    config = json.loads((model.path / "config.json").read_bytes())
    positions = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    wanted = max(model.length + 1, LEAST_LENGTH)
    return min(wanted, positions) if isinstance(positions, int) else wanted


def cached_tokens(model: EngineModel) -> int:
    """The tokens whose keys and values SGLang may hold on a CPU, where it would else take most of the memory."""
    from opd_mcp.schemas.memory import ModelShape

    config = json.loads((model.path / "config.json").read_bytes())
    shape = ModelShape.of(0, 0, config.get("text_config", config).get)
    return max(served_length(model), int(CPU_CACHE_BYTES / (4 * shape.cached_values(0, 1))))


def memory_share(model: EngineModel, devices: Sequence[str] = (), *, of_free: bool = False) -> float:
    """The share of each GPU's memory that an engine may use: what is free, less room for the model here on our GPU.

    It is vLLM's share of all memory, or SGLang's of what is free.
    """
    from opd_mcp.devices.hardware import gpus

    ours = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    room = 1.2 * weight_bytes(model.path) if model.room is None else model.room
    shares = [
        (gpu.free_memory - (room if gpu.uuid in ours else 0) - SPARE_BYTES)
        / (gpu.free_memory if of_free else gpu.total_memory)
        for gpu in gpus()
        if gpu.uuid in (devices or ours)
    ]
    return min(max(min(shares), 0.1), 0.9) if shares else 0.5


def weight_bytes(model: Path) -> int:
    """Bytes of a model's weights as they are stored."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


class _Killed(Exception):
    """A signal ended the engine, or its keeper, before it answered: starting it again can help."""


KILLED = "it was killed before it answered"


@dataclass
class ManagedEngine:
    """An engine that serves one model: started, watched by a thread, started again when it ends, and ended.

    `alert` is told of every restart. Of several engines of a run each has a `number`.
    """

    program: EngineProgram
    model: EngineModel
    run: Path
    settings: "EngineSettings"
    should_stop: Callable[[], bool]
    alert: Callable[[str, str], None]
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    port: int = 0
    number: int = 0
    restarts: int = 0
    failure: "Exception | None" = None
    keeper: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self.port = self.port or free_ports(1)[0]
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine watch", daemon=True)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def check(self) -> None:
        """Raise ResourceError `engine_failed` once it can no longer be kept running."""
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def running(self) -> Iterator["ManagedEngine"]:
        """The engine, answering, for the block's time; at its end no process of it is left.

        Raises ResourceError `engine_failed`, RunError `run_cancelled` when asked to stop while it starts.
        """
        with side_by_side([self]):
            yield self

    def begin(self) -> None:
        """Start it and watch it; raises as `running`."""
        try:
            self._start()
        except _Killed:
            self._restart(KILLED)
        self._watcher.start()

    def reload(self, path: Path) -> bool:
        """Give it the weights of another directory in place; whether it says that it has taken them.

        Whoever draws from it must compare it with the model. A restart starts it on them as well.
        """
        self.model = replace(self.model, path=path, name=self.model.served_name)
        where, body = "/update_weights_from_disk", dict[str, Any](model_path=str(path))
        if self.program.kind == "vllm":
            where, body = "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        begun = time.monotonic()
        status = self._asked("POST", where, self.settings.start_seconds, body)
        logger.info("%s has new weights after %.1f s: %s", self.program.kind, time.monotonic() - begun, status)
        return status == 200

    def stop(self) -> None:
        """Let it not be started again; a start in progress ends."""
        self._over.set()

    def end(self) -> None:
        """End every process of it, after its watcher."""
        self.stop()
        if self._watcher.ident is not None:
            self._watcher.join()
        self._end()

    def _start(self) -> None:
        """Start the processes and wait until they answer; raises _Killed where a signal ended them before."""
        begun = time.monotonic()
        command = self.program.command(self.model, self.port)
        logger.info("Starting %s for %s at %s", self.program.kind, self.model.path.name, self.url)
        told, tell = os.pipe()
        facts = {"command": command, "run": str(self.run), "number": self.number, "tell": tell}
        try:
            self.keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, json.dumps(facts)],
                stdin=subprocess.PIPE,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
                env=self.program.environment(os.environ, self.run, self.key, reloads=self.model.reloads)
                | {NUMBER: str(self.number)},
                start_new_session=True,
                pass_fds=(tell,),
            )
        finally:
            os.close(tell)
        with open(told, "rb") as status:
            self._await(begun, status)
        logger.info("%s answers after %.1f s", self.program.kind, time.monotonic() - begun)

    def _await(self, begun: float, status: BinaryIO) -> None:
        while self._health() != 200:
            if self.should_stop() or self._over.is_set():
                raise stopped()
            if self.keeper is None or has_ended(self.keeper):
                ended = status.read().decode()  # empty where the keeper was killed
                if not ended or not 0 <= int(ended) <= SHELLS_SIGNALS:
                    raise _Killed
                raise self._failed(f"it ended with status {ended} before it answered")
            if time.monotonic() - begun > self.settings.start_seconds:
                raise self._failed(f"it did not answer within {self.settings.start_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        looks, next_look = 0, time.monotonic() + HEALTH_SECONDS
        while not self._over.wait(POLL_SECONDS):
            ended = self.keeper is None or has_ended(self.keeper)
            if not ended and time.monotonic() >= next_look:
                next_look = time.monotonic() + HEALTH_SECONDS
                # A busy server may be slow (None for a timeout is no failure); one whose cores are gone says so.
                looks = looks + 1 if self._health() in (0, 500, 503) else 0
            if not ended and looks < FAILED_LOOKS:
                continue
            looks = 0
            try:
                self._restart("its processes ended" if ended else "it said that it cannot work any more")
            except Exception as error:
                self.failure = error
                return

    def _restart(self, why: str) -> None:
        while True:
            self._end()
            if self.restarts >= self.settings.restarts:
                raise self._failed(f"{why}, after {self.restarts} restarts")
            self.restarts += 1
            self.alert(
                "engine_restarted",
                f"{self.program.kind} for {self.model.served_name} is started again ({self.restarts} of "
                f"{self.settings.restarts} times in this phase): {why}. Rows that are finished are kept.",
            )
            try:
                self._start()
                return
            except _Killed:
                why = KILLED

    def _failed(self, why: str) -> "OpdError":
        from opd_mcp.schemas.errors import ResourceError
        from opd_mcp.schemas.next_action import resume_call

        return ResourceError(
            "engine_failed",
            f"{self.program.kind} does not serve {self.model.path.name}: {why}.",
            value=self.program.program,
            fix="Read the end of the run's log, where the engine writes; remove the cause and resume the run (finished "
            "shards are kept), or use the engine 'local'.",
            call=resume_call(),
        )

    def _health(self) -> int | None:
        """The status of /health; 0 where nobody listens, None where no answer comes in time."""
        return self._asked("GET", "/health", HEALTH_SECONDS)

    def _asked(self, verb: str, where: str, seconds: float, body: "dict[str, Any] | None" = None) -> int | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(verb, where, body=None if body is None else json.dumps(body), headers=headers)
            return connection.getresponse().status
        except TimeoutError:
            return None
        except (OSError, HTTPException):
            return 0
        finally:
            connection.close()

    def _end(self) -> None:
        """End every process, and wait until their memory is free."""
        if self.keeper is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.keeper.pid, signal.SIGKILL)  # its number stays taken until it is waited for
        end_marked(self.run, self.number)
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait()
        self.keeper = None
        deadline = time.monotonic() + END_SECONDS
        while marked(self.run, self.number) and time.monotonic() < deadline:
            end_marked(self.run, self.number)
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def side_by_side(engines: Sequence[ManagedEngine]) -> Iterator[Sequence[ManagedEngine]]:
    """Engines of one run, started together, all answering, for the block's time; at its end no process is left.

    Raises as `ManagedEngine.running`: one that does not start ends the others.
    """
    end_marked(engines[0].run)  # of an attempt whose worker and keeper were both killed
    with ThreadPoolExecutor(len(engines), "engine start") as pool:
        try:
            done, _ = wait([pool.submit(engine.begin) for engine in engines], return_when=FIRST_EXCEPTION)
            for start in done:
                start.result()
            yield engines
        finally:
            for engine in engines:
                engine.stop()
            pool.shutdown()
            for engine in engines:
                engine.end()


def stopped() -> "OpdError":
    """The error of a run that was asked to stop while its engine started."""
    from opd_mcp.worker.pipeline import run_cancelled

    return run_cancelled()


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a child has ended, without reaping it: until then its number is nobody else's."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def free_ports(count: int) -> list[int]:
    """Different ports of loopback where nobody listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def marked(run: Path, number: int | None = None) -> list[int]:
    """The living processes of a run's engines, or of one of them, by their environment.

    None where the system does not show it.
    """
    marks, found = {f"{MARK}={run}".encode()}, []
    if number is not None:
        marks.add(f"{NUMBER}={number}".encode())
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def end_marked(run: Path, number: int | None = None) -> None:
    """End the living processes of a run's engines, or of one of them."""
    for pid in marked(run, number):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def keep(facts: Mapping[str, Any]) -> None:
    """Start the command, and end its whole group once it or the worker ends."""
    engine = subprocess.Popen(facts["command"], stdin=subprocess.DEVNULL)
    while engine.poll() is None:
        if select.select([0], [], [], POLL_SECONDS)[0] and not os.read(0, 1):
            break
    else:
        print(f"the engine ended with status {engine.returncode}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # once it has answered nobody reads this
            os.write(facts["tell"], str(engine.returncode).encode())
    end_marked(Path(facts["run"]), facts["number"])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    keep(json.loads(sys.argv[1]))
