"""Real ranks: processes that meet in a folder over gloo, each doing what `stand_ins/rank_work.py` says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import opd_mcp

WORK = Path(__file__).parents[1] / "stand_ins" / "rank_work.py"
PACKAGE = Path(opd_mcp.__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranks-json", type=Path, help="the results of these tests, added to those that the file has")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--ranks-json", None)) is not None:
        config.pluginmanager.register(Results(file))


@dataclass(frozen=True)
class Results:
    """Writes how each test ended, with what it measured, as soon as it has ended."""

    file: Path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        tests = json.loads(self.file.read_bytes())["tests"] if self.file.exists() else {}
        numbers = {name: float(f"{value:.3g}") for name, value in report.user_properties}
        tests[report.nodeid.rpartition("/")[2]] = {"outcome": report.outcome, **numbers}
        found = {"torch": version("torch"), "cores": os.cpu_count(), "tests": dict(sorted(tests.items()))}
        self.file.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[Any]]]:
    """`on_ranks(size, case, …)`: each rank's answers to the cases, which so many processes did one after the other."""

    def run(size: int, *cases: dict[str, Any]) -> list[list[Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        file = folder / "cases.json"
        file.write_text(json.dumps({"cases": cases, "size": size}))
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-P", str(WORK), str(file)]
        processes = [
            subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        errors = [process.communicate()[1] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(errors)
        return [json.loads((folder / f"answer-{rank}.json").read_bytes()) for rank in range(size)]

    return run
