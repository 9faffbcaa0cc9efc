"""What all tests share: a job service over its own workspace and leases, whose workers are real processes.

Workers run stand-in stages unless a test asks for the engine. Triton's kernels run in its interpreter, and tests of an
extra are skipped where it is missing.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from opd_mcp.devices import hardware as devices
from opd_mcp.devices.leases import LeaseFolder
from opd_mcp.devices.settings import JobSettings
from opd_mcp.schemas.requests import BuildTeacherCache, PlanDistillation, StartDistillation, StartSft
from opd_mcp.schemas.runs import ACTIVE_STATES, RunStatus
from opd_mcp.service import JobService
from opd_mcp.store.roots import AllowedRoots
from opd_mcp.store.workspace import Workspace

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
# A busy machine is no failure, and every example writes its files anew.
TOLERATED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("suite", deadline=None, suppress_health_check=TOLERATED)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `@pytest.mark.needs("package")` where the package is missing; `make test-extras` brings it."""
    for item in items:
        for marker in item.iter_markers("needs"):
            if find_spec(marker.args[0]) is None:
                item.add_marker(pytest.mark.skip(reason=f"make test-extras: {marker.args[0]} is not installed"))


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WORKER = Path(__file__).parent / "stand_ins" / "stand_in_worker.py"
DEADLINE_SECONDS = 120.0


@dataclass(frozen=True)
class World:
    """Two small models, prompts, and a place for everything."""

    root: Path
    settings: JobSettings
    teacher: str
    student: str
    other_teacher: str

    def service(self) -> JobService:
        """A new service, as another server process would have it."""
        return JobService(Workspace(self.root / "home"), AllowedRoots([self.root / "data"]), self.settings)

    def prompts(self, name: str = "prompts", count: int = 6, start: int = 0, **fields: object) -> str:
        """A prompts file with answers, e.g. `1+0=?`."""
        rows = [{"id": f"{name}-{i}", "prompt": f"1+{start + i}=?", "answer": "1", **fields} for i in range(count)]
        return self.file(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def file(self, name: str, content: str) -> str:
        """A file below the allowed root."""
        path = self.root / "data" / name
        path.write_text(content)
        return str(path)

    def plan_arguments(self, **changes: object) -> PlanDistillation:
        """A distillation of the two models."""
        defaults = {"student": self.student, "teacher": self.teacher, "prompts": self.prompts(), "preset": "demo"}
        return PlanDistillation(**{**defaults, **changes})

    def start_arguments(self, **changes: object) -> StartDistillation:
        """The same as a start: three steps each, so over in a moment."""
        short = {"sft.steps": 3, "distill.steps": 3}
        overrides = {**short, **changes.pop("overrides", {})}
        return StartDistillation(**self.plan_arguments(**changes, overrides=overrides).model_dump())

    def cache_arguments(self, student: str, **changes: object) -> BuildTeacherCache:
        """A teacher cache of a student's rollouts."""
        defaults = {"teacher": self.teacher, "student": student, "prompts": self.prompts(), "preset": "demo"}
        return BuildTeacherCache(**{**defaults, **changes})

    def sft_arguments(self, **overrides: object) -> StartSft:
        """A fine-tuning that is the only phase of its run."""
        responses = self.file("responses.jsonl", '{"prompt": "1+1=?", "response": "#2"}\n' * 8)
        given = {"student": self.student, "responses": responses, "declared_teacher": "teacher"}
        return StartSft(**given, preset="demo", overrides=overrides)

    def copy_of(self, model: str | Path, name: str) -> Path:
        """A copy of a model directory, to be changed."""
        return Path(shutil.copytree(model, self.root / "data" / name))


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "data").mkdir()
    settings = JobSettings(
        lease_folder=tmp_path / "leases", cpu_slots=2, worker_command=(sys.executable, str(WORKER)), examples=EXAMPLES
    )
    models = {name: str(EXAMPLES / "arithmetic" / name) for name in ("teacher", "student")}
    return World(tmp_path, settings, **models, other_teacher=str(EXAMPLES / "arithmetic" / "teacher_other_style"))


@pytest.fixture
def service(world: World) -> JobService:
    return world.service()


def service_with_engine(world: World, home: str) -> JobService:
    """A service over a workspace of this name, whose workers are `opd-mcp worker` with the engine."""
    settings = JobSettings(world.settings.lease_folder, 2, world.settings.examples)
    return JobService(Workspace(world.root / home), AllowedRoots([world.root / "data"]), settings)


@pytest.fixture
def real_service(world: World) -> JobService:
    return service_with_engine(world, "home")


@pytest.fixture
def undisturbed_service(world: World) -> JobService:
    """The same over another workspace, for what a run would have given that nothing happened to."""
    return service_with_engine(world, "undisturbed")


@pytest.fixture
def leases(world: World) -> LeaseFolder:
    """The lease folder that the service's workers use."""
    return LeaseFolder(world.settings.lease_folder, world.settings.cpu_slots)


@pytest.fixture
def busy_machine(leases: LeaseFolder):
    """All CPU slots are taken until `release`, that for short runs too, so that new runs stay queued."""
    lease = leases.acquire("somebody-else", leases.cpu_slot_names(), 2, lambda: False)
    short = leases.acquire("somebody-else", ["short-cpu"], 1, lambda: False)
    lease.slots += short.slots
    lease.descriptors += short.descriptors
    yield lease
    lease.release()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """`gpu(total, free)`: a machine with one GPU of so many MiB, as an executable `nvidia-smi` on PATH tells."""

    def install(total: int, free: int) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho 'GPU-1a, NVIDIA Tiny, {total}, {free}'\n")
        tool.chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(devices, "version", lambda name: "2.13.0")

    return install


Wait = Callable[..., RunStatus]


@pytest.fixture
def until() -> Wait:
    """`until(service, run_id, condition)`: the first status that satisfies the condition."""

    def wait(service: JobService, run_id: str, condition: Callable[[RunStatus], bool]) -> RunStatus:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition(status := service.status(run_id)):
            assert time.monotonic() < deadline, status
            assert status.state in ACTIVE_STATES, status
            time.sleep(0.02)
        return status

    return wait


@pytest.fixture
def finished(until: Wait):
    """`finished(service, run_id)`: the final status."""
    return lambda service, run_id: until(service, run_id, lambda status: status.state not in ACTIVE_STATES)


@pytest.fixture
def sft_student(world: World, service: JobService, finished):
    """`sft_student(teacher)`: the path of a student that was fine-tuned on that teacher's responses."""

    def make(teacher: str) -> str:
        arguments = world.start_arguments(teacher=teacher, method="sft", overrides={"sft.steps": 1})
        status = finished(service, service.start_distillation(arguments).run_id)
        assert status.state == "succeeded", status
        return status.result["paths"]["sft"]

    return make
