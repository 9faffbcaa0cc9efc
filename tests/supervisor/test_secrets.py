"""Secrets in the environment and in what a teacher's server says end up in no file of the workspace."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import GetRunLogs
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

PLANTED = {
    "OPD_TEACHER_KEY": "a teacher key in plain words",
    "HF_TOKEN": "a token in plain words",
    "OPD_TOKEN": "another token in plain words",
    "DB_PASSWORD": "a password in plain words",
    "AWS_SECRET_ACCESS_KEY": "an access key in plain words",
    "DATABASE_URL": "a data base in plain words",
}
SHAPED = ("hf_" + "a1B2" * 8, "sk-" + "A1b2" * 8, "letmein")
# Before the engine is loaded, as a library would: into the log, and as an exception that ends the run.
LEAKING_WORKER = """
import os, sys
from opd_mcp import cli
from opd_mcp.worker import main as worker
def leak(*_):
    said = " | ".join([*(os.environ.get(n, "") for n in {names!r}), {shaped!r}])
    print(said)
    print(said, file=sys.stderr)
    raise ValueError(said)
worker.prepared_record = leak
sys.argv[0] = "opd-mcp"
cli.main()
"""


@pytest.fixture
def service(world, monkeypatch) -> JobService:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    shaped = f"{SHAPED[0]} {SHAPED[1]} https://somebody:{SHAPED[2]}@example.org"
    script = LEAKING_WORKER.format(names=list(PLANTED), shaped=shaped)
    command = (sys.executable, "-c", script, "worker")
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples, command)
    return JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)


TELLING_WORKER = """
import json, os, sys
from pathlib import Path
Path({told!r}).write_text(json.dumps(dict(os.environ)))
"""


@pytest.mark.parametrize("offline", [False, True])
def test_a_worker_inherits_what_it_needs_and_no_other_secret(world, monkeypatch, finished, offline):
    needed = {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(world.root / "hf"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "LC_TIME": "C",
        "OTEL_SERVICE_NAME": "here",
        "XDG_CACHE_HOME": str(world.root / "cache"),
        "CUDA_MODULE_LOADING": "LAZY",
    }
    for name, value in {**needed, **PLANTED, "PYTHON_API_KEY": "k", "HF_HUB_OFFLINE": str(int(offline))}.items():
        monkeypatch.setenv(name, value)
    told = world.root / "told.json"
    command = (sys.executable, "-c", TELLING_WORKER.format(told=str(told)), "worker")
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples, command)
    service = JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)
    assert finished(service, service.start_distillation(world.start_arguments()).run_id).state == "lost"
    inherited = json.loads(told.read_text())
    assert needed.items() <= inherited.items()
    assert inherited["PATH"]
    assert {name for name in PLANTED if name in inherited} == {"OPD_TEACHER_KEY"} | (set() if offline else {"HF_TOKEN"})
    assert "PYTHON_API_KEY" not in inherited


def files_with(root, texts):
    """Every file below `root` that holds one of the texts."""
    found = []
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [(path.name, text) for text in texts if text.encode() in content]
    return found


def test_an_exception_and_a_log_full_of_secrets_leave_none_behind(world, service, finished):
    run = service.start_distillation(world.start_arguments())
    status = finished(service, run.run_id)
    assert (status.state, status.error.code) == ("failed", "internal_error")
    assert "[redacted]" in status.error.cause
    log = "\n".join(service.run_logs(GetRunLogs(run_id=run.run_id)).lines)
    assert log.count("[redacted]") > 5, "the log was written, and redacted"
    assert files_with(service.workspace.root, [*PLANTED.values(), *SHAPED]) == []


def test_every_file_of_a_run_is_its_owners_alone(world, service, finished):
    finished(service, service.start_distillation(world.start_arguments()).run_id)
    wide = [path for path in service.workspace.root.rglob("*") if path.lstat().st_mode & 0o077]
    assert wide == []


def test_a_teachers_server_elsewhere_is_not_asked_unless_the_owner_said_so(world, service):
    arguments = {"student": world.student, "teacher": "t", "declared_teacher": "t"}
    elsewhere = world.cache_arguments(**arguments, teacher_url="http://169.254.169.254/latest")
    with pytest.raises(ArgumentError, match="teacher_host_not_allowed"):
        service.build_teacher_cache(elsewhere)
    assert service.list_runs().total == 0


class _Echo(BaseHTTPRequestHandler):
    """Refuses every request, and shows what it was asked with."""

    def do_GET(self):
        content = f"denied: {self.headers.get('Authorization')} {' '.join(SHAPED[:2])}".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


def test_a_server_that_echoes_the_key_does_not_get_it_into_the_journal(world, monkeypatch, finished):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples)
    service = JobService(Workspace(world.root / "home"), AllowedRoots([world.root / "data"]), settings)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = {"student": world.student, "teacher": "t", "declared_teacher": "t"}
        url = f"http://127.0.0.1:{server.server_port}"
        short = {"rollout.count": 2, "rollout.sampling.max_new_tokens": 4}
        run = service.build_teacher_cache(world.cache_arguments(**arguments, teacher_url=url, overrides=short))
        status = finished(service, run.run_id)
        server.shutdown()
    assert status.error.code == "teacher_refused", status
    assert "denied" in status.error.cause
    assert files_with(service.workspace.root, [*PLANTED.values(), *SHAPED]) == []
