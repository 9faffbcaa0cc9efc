"""A stand-in for a Ray cluster: the Jobs API of its dashboard as Ray 2.60 answers, with jobs that are processes here.

While `held`, jobs wait. A stop reaches a waiting job only once it has begun, as Ray's does.
"""

import json
import os
import shlex
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STARTED_TOO_LATE = (
    "Job supervisor actor failed to start within 900.0 seconds. This timeout can be configured by setting the "
    "environment variable RAY_JOB_START_TIMEOUT_SECONDS."
)
DIED = """Job supervisor actor died: The actor died unexpectedly before finishing this task.
\tclass_name: JobSupervisor
\tpid: 14970
The actor died because its node has died. Node Id: da8c491e
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""


class FakeRay:
    """One cluster with two nodes of two cores, one of which is dead."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.held = False
        self.mute = False
        """Requests are done and not answered."""
        self.token: str | None = None
        self.jobs: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self._environment = environment
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "FakeRay":
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply()

            def do_POST(self) -> None:
                self._reply()

            def _reply(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                known = cluster.token is None or self.headers.get("Authorization") == f"Bearer {cluster.token}"
                found = cluster.answer(self.command, self.path, content) if known else (401, "Unauthorized: no token")
                if cluster.mute:
                    return
                status, text = found
                self.send_response(status)
                self.end_headers()
                self.wfile.write((text if isinstance(text, str) else json.dumps(text)).encode())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_listening()
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def address(self) -> str:
        """Of the dashboard."""
        assert self._server is not None, "it listens"
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop_listening(self) -> None:
        """The head node is gone; what works on the others goes on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def let_go(self) -> None:
        """Waiting jobs begin with the next request."""
        self.held = False

    def expire(self, job: str) -> None:
        """A job has waited for too long."""
        self._end(job, "FAILED", STARTED_TOO_LATE)

    def lose_node_of(self, job: str) -> None:
        """The node of a job dies."""
        os.killpg(self._processes[job].pid, signal.SIGKILL)
        self._end(job, "FAILED", DIED)

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, object]:
        """Status and body."""
        with self._lock:
            self.calls.append((method, path))
            self._settle()
            if path == "/api/version":
                return 200, {"version": "4", "ray_version": "2.60.0"}
            if path.startswith("/api/v0/nodes"):
                alive = {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 8e9}}
                return 200, {"data": {"result": {"result": [alive, {**alive, "state": "DEAD"}]}}}
            if (method, path) == ("POST", "/api/jobs/"):
                return self._submit(json.loads(content))
            job, _, action = path.removeprefix("/api/jobs/").partition("/")
            if job not in self.jobs:
                return 404, f"Job {job} does not exist" if path.startswith("/api/jobs/") else "404: Not Found"
            if action == "stop":
                self._stop(job)
                return 200, {"stopped": True}
            return 200, self.jobs[job]

    def _submit(self, request: dict[str, Any]) -> tuple[int, object]:
        job = request["submission_id"]
        if job in self.jobs:
            return 500, f"Traceback (most recent call last):\nValueError: Job with submission_id {job} already exists."
        self.jobs[job] = {**request, "status": "PENDING", "message": "Job has not started yet.", "stops": False}
        if not request.get("entrypoint_num_cpus"):  # for the head node, which has no `ray` to import here
            killed = shlex.split(request["entrypoint"])[-1]
            assert "ray.kill" in request["entrypoint"], request
            self._end(killed, "FAILED", DIED)
            self._end(job, "SUCCEEDED", "Job finished successfully.", 0)
        self._settle()
        return 200, {"job_id": job, "submission_id": job}

    def _stop(self, job: str) -> None:
        self.jobs[job]["stops"] = True
        if self.jobs[job]["status"] == "RUNNING":
            os.killpg(self._processes[job].pid, signal.SIGTERM)

    def _settle(self) -> None:
        for name, job in self.jobs.items():
            if job["status"] == "PENDING" and not self.held:
                command = ["/bin/sh", "-c", job["entrypoint"]]
                self._processes[name] = subprocess.Popen(
                    command, env=self._environment, start_new_session=True, stdout=subprocess.PIPE, stderr=-2
                )
                job.update(status="RUNNING", message="Job is currently running.")
            code = self._processes[name].poll() if job["status"] == "RUNNING" else None
            if code is not None:
                said = self._processes[name].stdout.read().decode()  # type: ignore[union-attr]
                logs = f"Job entrypoint command failed with exit code {code}, last available logs "
                message = f"{logs}(truncated to 20,000 chars):\n{job['entrypoint']}\n{said}" if code else "finished"
                status = "STOPPED" if job["stops"] else "FAILED" if code else "SUCCEEDED"
                self._end(name, status, message, None if job["stops"] else code)

    def _end(self, job: str, status: str, message: str, code: int | None = None) -> None:
        self.jobs[job].update(status=status, message=message, driver_exit_code=code)
