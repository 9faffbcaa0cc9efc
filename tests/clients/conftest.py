"""Clients that nobody here wrote against real server processes; run by `make test-clients`, which installs them.

Without `--clients DIR` (the folder of the npm packages) these tests are left out; with it, nothing may be missing.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples" / "arithmetic"
SERVE = [sys.executable, "-m", "opd_mcp.cli", "serve"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients", type=Path, help="folder with the npm packages of tests/clients/package.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--clients") is None:
        skip = pytest.mark.skip(reason="needs npm packages and Chromium: make test-clients")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@dataclass(frozen=True)
class Node:
    """Node 22 and the installed packages."""

    folder: Path

    def run(self, script: str | Path, *arguments: str, timeout: int = 120, **environment: str) -> Any:
        """The finished process of a script, of this folder or of an installed package."""
        path = HERE / script if (HERE / script).is_file() else self.folder / "node_modules" / ".bin" / script
        binary = self.folder / "node_modules" / "node" / "bin" / "node"
        return subprocess.run(
            [str(binary), str(path), *arguments],
            env={**os.environ, "CLIENTS": str(self.folder), "HOME": str(self.folder), **environment},
            capture_output=True, text=True, timeout=timeout, check=False, cwd=self.folder,
        )  # fmt: skip

    def answer(self, script: str, *arguments: str, **environment: str) -> Any:
        """What a script that must succeed prints on its last line."""
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def node(request: pytest.FixtureRequest) -> Node:
    return Node(request.config.getoption("--clients").resolve())


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a server with a workspace and leases of its own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "runtime").mkdir(mode=0o700)
    return {"OPD_HOME": str(folder / "workspace"), "XDG_RUNTIME_DIR": str(folder / "runtime")}


Serving = Callable[..., str]


@pytest.fixture(scope="session")
def serving(home: dict[str, str]) -> Iterator[Serving]:
    """`serving(*command)`: starts a server process that takes a port, waits for it, and answers its base URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **environment: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [word.replace("PORT", str(port)) for word in command]
        started.append(subprocess.Popen(words, env={**os.environ, **home, **environment}, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="session")
def url(serving: Serving) -> str:
    """Our server's base URL."""
    return serving(*SERVE, "--transport", "http", "--port", "PORT", "--no-token")


def fetched(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return str(answer.read().decode())
