"""A workspace with executors whose programs are small executables, on PATH, that start real processes."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_mcp.supervisor.executors import slurm

FAKE = Path(__file__).parents[2] / "stand_ins" / "fake_cluster.py"
PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "ssh")


@dataclass(frozen=True)
class Cluster:
    """The folder of the fake cluster."""

    root: Path

    def hold(self) -> None:
        """Jobs wait from now on."""
        (self.root / "hold").touch()

    def let_go(self) -> None:
        """Waiting jobs begin with the next call."""
        (self.root / "hold").unlink()

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        file = self.root / "calls"
        called = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call[1:] for call in called if call[0] == program]

    def job(self, number: int) -> dict[str, object]:
        """What is known of a job."""
        return json.loads((self.root / f"{number}.json").read_text())

    def change(self, number: int, **values: object) -> None:
        """Change what is known of a job."""
        (self.root / f"{number}.json").write_text(json.dumps({**self.job(number), **values}))


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    root, programs = tmp_path / "cluster", tmp_path / "programs"
    root.mkdir()
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f"#!{sys.executable} -S\n{FAKE.read_text()}")
        (programs / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLUSTER", str(root))
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.3)  # so that a job that may begin begins soon
    return Cluster(root)


@pytest.fixture
def placed(world, cluster, monkeypatch, tmp_path):
    """A service whose settings name a Slurm cluster `big` and two hosts `desks`, the first of which is down."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    setup = json.dumps([f"export TEST_LEASES={world.settings.lease_folder} TMPDIR={tmp_path}"])
    service = world.service()
    (service.workspace.root / "settings.toml").write_text(
        f"""
[executors.big]
kind = "slurm"
partition = "main"
memory_gb = 64
lease_seconds = 3
setup = {setup}

[executors.desks]
kind = "ssh"
hosts = ["down", "desk"]
memory_gb = 64
lease_seconds = 3
setup = {setup}
"""
    )
    return world.service()
