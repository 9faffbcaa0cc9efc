"""Twenty identical starts from four server processes: one run."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd_mcp.supervisor import launch

SERVER = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from opd_mcp.service import JobService
    from opd_mcp.devices.settings import JobSettings
    from opd_mcp.schemas.requests import StartDistillation
    from opd_mcp.store.roots import AllowedRoots
    from opd_mcp.store.workspace import Workspace

    root = Path({root!r})
    settings = JobSettings(root / "leases", 2, worker_command={command!r})
    service = JobService(Workspace(root / "home"), AllowedRoots([root / "data"]), settings)
    arguments = StartDistillation.from_json(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(5) as threads:
        for answer in threads.map(lambda _: service.start_distillation(arguments), range(5)):
            print(answer.run_id, answer.reused, flush=True)
    sys.stdin.readline()
"""


def test_twenty_equal_starts_from_four_processes_are_one_run(world, service, busy_machine, finished):
    code = textwrap.dedent(SERVER.format(root=str(world.root), command=world.settings.worker_command))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(4)]
    try:
        for server in servers:
            server.stdin.write(world.start_arguments().to_json() + "\n")
            server.stdin.flush()
        for server in servers:
            assert server.stdout.readline() == "ready\n"
        for server in servers:
            server.stdin.write("go\n")
            server.stdin.flush()
        answers = [server.stdout.readline().split() for server in servers for _ in range(5)]
    finally:
        for server in servers:
            server.communicate("end\n", timeout=30)
    assert len({run_id for run_id, _ in answers}) == 1
    assert sorted(reused for _, reused in answers) == ["False", *["True"] * 19]
    [row] = service.list_runs().rows
    service.cancel(row.run_id)
    assert finished(service, row.run_id).state == "cancelled"


def test_no_answer_rests_on_a_start_that_may_still_die(world, service, finished, monkeypatch):
    """The first caller has made the run and dies before its worker lives; the second one must not have trusted it."""
    made, killed, launched = threading.Event(), threading.Event(), launch.launch_worker

    def dies_on_the_way(workspace, lock, settings):
        monkeypatch.setattr(launch, "launch_worker", launched)
        made.set()
        killed.wait(30)
        lock.release()
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch_worker", dies_on_the_way)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(service.start_distillation, world.start_arguments())
        assert made.wait(30)
        second = threads.submit(world.service().start_distillation, world.start_arguments())
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)
        killed.set()
        answer = second.result(timeout=30)
        with pytest.raises(KeyboardInterrupt):
            first.result()
    assert not answer.reused
    assert finished(service, answer.run_id).state == "succeeded"
    assert [row.state for row in service.list_runs().rows] == ["succeeded", "lost"]
