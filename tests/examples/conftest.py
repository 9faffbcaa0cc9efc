"""The example scripts as processes of their own, and a few rows of the arithmetic task."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples' folder, its scripts importable."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return EXAMPLES


@pytest.fixture
def run_example(tmp_path: Path) -> Run:
    """Runs a script of examples/ in its own workspace, with leases of its own and without the Hub."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = {
        **os.environ,
        "OPD_HOME": str(tmp_path / "workspace"),
        "XDG_RUNTIME_DIR": str(tmp_path / "runtime"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment, check=False
        )

    return run


@pytest.fixture
def few_rows(tmp_path: Path) -> Callable[[str, int], Path]:
    """The first rows of a file of the arithmetic task, as a file."""

    def rows(name: str, count: int) -> Path:
        lines = (EXAMPLES / "arithmetic" / name).read_text(encoding="utf-8").splitlines()[:count]
        file = tmp_path / f"few-{Path(name).name}"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return rows
