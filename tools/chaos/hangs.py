"""Workers that do not answer: each must end within the grace times, free its device, and leave a run that can go on.

With the engine: chat templates in one native call, teacher servers that send a byte now and then, SIGSTOP at moments
that nobody chose. Without it, since a worker without torch hangs as well: native calls, blocked signals, Python code
that asks nobody, guardians that were killed or stopped, SIGTERM instead of a cancel, processes that do not exit.
"""

import contextlib
import os
import random
import shutil
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.schemas.requests import BuildTeacherCache, SampleModel
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.worker_process import live_worker
from tools import EXAMPLE
from tools.chaos.processes import command
from tools.chaos.workload import Place, arguments

GRACE_SECONDS = 1.0
# Two grace times; four for those who look in the guardian's place; the rest is for a loaded machine to start Python.
END_SECONDS = 4 * GRACE_SECONDS + 15.0
BEGIN_SECONDS = 90.0
TEMPLATE = """{% set one = [0] * 10000 %}{% set other = [0] * 10000 %}{% for n in range(1) %}
{% set a = [one] * 10000 %}{% set b = [other] * 10000 %}{% set a = [a] * 10000 %}{% set b = [b] * 10000 %}
{% set a = [a] * 10000 %}{% set b = [b] * 10000 %}{% if a == b %}equal{% endif %}{% endfor %}"""
TRICKLES = {
    "status": (b"HTTP/1.1 200 O", b"K"),
    "headers": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
}
ENGINE_KINDS = ("template", "teacher", "stopped")
KINDS = (
    *("template", "teacher", "native", "stopped", "blocked", "busy", "sigterm"),
    *("guardian_killed", "guardian_stopped", "never_exits", "stopped_native"),
)
EXPIRED = "template_expired"
"""A template that no one cancels, ended by the limit on its processor time: 20 s, so there is one."""
EXPIRY_SECONDS = 120.0
"""Time for so much processor time on a busy machine."""


@dataclass
class Hangs:
    """How many workers hung, by kind, and what was wrong with the end of any."""

    kinds: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    wrong: list[str] = field(default_factory=list)


def hung_workers(root: Path, seed: int, count: int, tell: Callable[[str], None]) -> Hangs:
    """Let `count` workers hang, two at a time, and end each."""
    rng, found = random.Random(f"{seed}/hangs"), Hangs()
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    if count > len(KINDS):
        kinds[-1] = EXPIRED
    rng.shuffle(kinds)

    def one(number: int) -> tuple[str, list[str]]:
        return kinds[number], hung_worker(root / f"{number}-{kinds[number]}", kinds[number], f"{seed}/{number}")

    root.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        for kind, wrong in pool.map(one, range(count)):
            found.kinds[kind] += 1
            found.ended += not wrong
            found.wrong += wrong
    tell(f"hangs: {dict(sorted(found.kinds.items()))}")
    return found


def hung_worker(root: Path, kind: str, seed: str) -> list[str]:
    """What was wrong with the end of one worker that hung in this way."""
    rng, how = random.Random(seed), root / "how"
    root.mkdir()
    with contextlib.ExitStack() as held:
        place = Place(root, None if kind in ENGINE_KINDS or kind == EXPIRED else command("hanging", how))
        service = place.service()
        (place.root / "home" / "settings.toml").write_text(f"[stop]\ngrace_seconds = {GRACE_SECONDS}\n")
        try:
            run_id, worker = begun(held, place, service, kind, rng)
            guardian = guardian_of(worker)
            held.callback(kill, guardian)
            asked = stop(service, run_id, kind, worker, guardian)
            status = ended_soon(service, run_id, asked)
            wrong = [*unlike(kind, status), *still_there(place, worker, asked)]
            how.unlink(missing_ok=True)
            wrong += [] if status.state == "succeeded" else resumed(service, run_id, kind)
        except (TimeoutError, psutil.Error) as error:
            wrong = [repr(error)]
        for left in service.store.active_runs():
            if (killed := live_worker(place.run_directory(left), service.store.view(left).attempt)) is not None:
                kill(killed)
    return [f"{kind}: {problem}" for problem in wrong]


def begun(
    held: contextlib.ExitStack, place: Place, service: JobService, kind: str, rng: random.Random
) -> tuple[str, psutil.Process]:
    """The run of a worker that hangs by now, and the worker."""
    if kind == "teacher":
        return _trickled(held, service, rng)
    if kind == "stopped":
        return _stopped(service, rng)
    if kind in ("template", EXPIRED):
        return _in_template(place, service)
    how = place.root / "how"
    sort = {"blocked": "blocked", "busy": "busy", "never_exits": "never_exits"}.get(kind, "native")
    how.write_text(sort, encoding="utf-8")
    run_id = service.sample_model(SampleModel(model=str(EXAMPLE / "student"), prompts=["1+1=?"])).run_id
    wait(lambda: how.with_suffix(".begun").exists(), f"{kind} has not begun")
    return run_id, worker_of(service, run_id)


def _trickled(held: contextlib.ExitStack, service: JobService, rng: random.Random) -> tuple[str, psutil.Process]:
    server = held.enter_context(trickling(*TRICKLES[rng.choice(list(TRICKLES))]))
    run_id = service.build_teacher_cache(
        BuildTeacherCache(
            teacher="distant",
            teacher_url=server.url,
            student=str(EXAMPLE / "student"),
            prompts=str(EXAMPLE / "opd.jsonl"),
            declared_teacher="distant",
            preset="demo",
            overrides={"rollout.count": 8},
        )
    ).run_id
    wait(server.sent.is_set, "nobody asked the teacher's server")
    return run_id, worker_of(service, run_id)


def _stopped(service: JobService, rng: random.Random) -> tuple[str, psutil.Process]:
    run_id = service.start_distillation(arguments("sft", **{"sft.steps": 4000})).run_id
    wait(lambda: service.status(run_id).state == "running", "the run does not begin")
    time.sleep(rng.uniform(0.0, 6.0))
    worker = worker_of(service, run_id)
    worker.suspend()
    wait(lambda: any(alert.code == "worker_stopped" for alert in service.status(run_id).alerts), "SIGSTOP is not shown")
    return run_id, worker


def _in_template(place: Place, service: JobService) -> tuple[str, psutil.Process]:
    model = place.root / "home" / "hostile"
    shutil.copytree(EXAMPLE / "student", model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    run_id = service.sample_model(SampleModel(model=str(model), prompts=["1+1=?"])).run_id
    wait(lambda: service.status(run_id).phase == "sample", "the sample does not begin")
    worker = worker_of(service, run_id)
    wait(lambda: computes_alone(worker), "the template does not hang")
    return run_id, worker


def computes_alone(worker: psutil.Process) -> bool:
    """Whether the process computes and opens, reads and writes nothing: it is in the template."""
    before, busy = worker.io_counters(), worker.cpu_times().user
    time.sleep(1.5)
    return worker.io_counters() == before and worker.cpu_times().user - busy > 0.2


def kill(process: psutil.Process) -> None:
    """End a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def guardian_of(worker: psutil.Process) -> psutil.Process:
    """The guardian of a worker."""
    return next(child for child in worker.children() if any("guardian.py" in word for word in child.cmdline()))


def stop(service: JobService, run_id: str, kind: str, worker: psutil.Process, guardian: psutil.Process) -> float:
    """Ask the run to end in the kind's way; when, by the monotonic clock."""
    if kind == "guardian_killed":
        guardian.kill()
    elif kind == "guardian_stopped":
        guardian.suspend()
    elif kind == "stopped_native":
        worker.suspend()
    if kind == "sigterm":
        worker.terminate()
    elif kind not in (EXPIRED, "never_exits"):
        service.cancel(run_id)
    asked = time.monotonic()
    return asked + (EXPIRY_SECONDS if kind == EXPIRED else 0.0)


def ended_soon(service: JobService, run_id: str, asked: float) -> RunStatus:
    """The final status; raises TimeoutError after the grace times."""
    while (status := service.status(run_id)).state in ACTIVE_STATES:
        if time.monotonic() > asked + END_SECONDS:
            raise TimeoutError(f"{run_id} has not ended: {status.state}, {status.alerts}")
        time.sleep(0.05)
    return status


def unlike(kind: str, status: RunStatus) -> list[str]:
    """What is unlike the kind's end."""
    wanted = {"sigterm": ("failed", "worker_terminated"), EXPIRED: ("failed", "too_slow")}
    state, code = wanted.get(kind, ("succeeded" if kind == "never_exits" else "cancelled", None))
    found = status.state, status.error.code if status.error else None
    return [] if found == (state, code) else [f"ended as {found}: {status.error}"]


def still_there(place: Place, worker: psutil.Process, asked: float) -> list[str]:
    """What is left of the worker: its process group, its device."""
    leases = LeaseFolder(place.root / "leases", 2)
    slots = [*leases.cpu_slot_names(), "short-cpu"]
    while group(worker.pid) or leases.busy(slots):
        if time.monotonic() > asked + END_SECONDS:
            return [f"processes {group(worker.pid)} and slots {leases.busy(slots)} are left"]
        time.sleep(0.05)
    return []


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def resumed(service: JobService, run_id: str, kind: str) -> list[str]:
    """What is wrong with the run once it is resumed: it must go on, and end when nothing hangs."""
    if service.resume(run_id).reused:
        return ["the resume found an active run"]
    if kind in ("template", "teacher", EXPIRED, "stopped"):  # its input is as it was, or it is long
        wait(lambda: service.status(run_id).state == "running", "the resumed run does not begin")
        service.cancel(run_id)
        status = ended_soon(service, run_id, time.monotonic())
        return [] if status.state == "cancelled" else [f"resumed and cancelled: {status.state}, {status.error}"]
    status = ended_soon(service, run_id, time.monotonic() + BEGIN_SECONDS)
    return [] if status.state == "succeeded" else [f"resumed: {status.state}, {status.error}"]


def worker_of(service: JobService, run_id: str) -> psutil.Process:
    """The worker of a run's first attempt; raises TimeoutError."""
    found = live_worker(service.workspace.run(run_id), 1)
    if found is None:
        raise TimeoutError(f"{run_id} has no worker: {service.status(run_id)}")
    return found


def wait(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait for a condition; raises TimeoutError."""
    end = time.monotonic() + BEGIN_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


@dataclass
class Trickle:
    """A server's address, and whether it has sent a byte."""

    url: str
    sent: threading.Event


@contextlib.contextmanager
def trickling(begin: bytes, byte: bytes) -> Iterator[Trickle]:
    """A server that sends `begin` at once, and then a byte every two seconds without end."""
    over, threads = threading.Event(), deque[threading.Thread]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        served = Trickle(f"http://127.0.0.1:{listener.getsockname()[1]}", threading.Event())

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5.0)
                connection.recv(1 << 16)
                connection.sendall(begin)
                while not over.wait(2.0):
                    connection.sendall(byte)
                    served.sent.set()

        def accept() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield served
        finally:
            over.set()
            accepting.join()
            for thread in threads:
                thread.join()
