"""What `inspect_setup` answers: the machine, the workspace, the limits and the embedded example."""

from typing import Literal

from pydantic import Field

from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.plans import Finding


class Device(Schema):
    """Something a run computes on; `slots` runs fit at a time, `slots_busy` of them are taken."""

    kind: Literal["cpu", "cuda"]
    name: str
    uuid: str | None = Field(None, description="GPU UUID, the key of its lease")
    total_memory_bytes: int
    free_memory_bytes: int
    slots: int
    slots_busy: int = 0


class ActiveRun(Schema):
    """A queued or running run, shortly."""

    run_id: str
    kind: str
    state: str
    phase: str | None = None


class Limits(Schema):
    """What one call may ask for."""

    wait_seconds: int = 25
    inline_prompts: int = 200
    inline_prompt_characters: int = 20_000
    baselines: int = 8
    list_limit: int = 100


class Quotas(Schema):
    """Bounds on what the runs of a workspace may take; absent means unbounded."""

    max_running_runs: int | None = Field(None, ge=1, description="runs that are queued or running at a time")
    max_gpu_hours: float | None = Field(None, gt=0, description="hours that one run holds its device, all attempts")
    max_bytes: int | None = Field(None, ge=1, description="size of the whole workspace")


class WorkspaceSettings(Schema):
    """The file as a whole."""

    quotas: Quotas = Quotas()


class ExamplePaths(Schema):
    """Absolute paths of the embedded arithmetic task."""

    teacher: str
    teacher_other_style: str
    student: str
    prompts_sft: str
    prompts_opd: str
    prompts_tune: str
    prompts_eval: str


class SetupReport(Schema):
    """The answer of `inspect_setup`."""

    version: str
    python: str
    devices: list[Device]
    free_disk_bytes: int
    workspace: str
    allowed_roots: list[str]
    active_runs: list[ActiveRun] = Field(default_factory=list)
    limits: Limits = Limits()
    quotas: Quotas = Quotas()
    problem: Finding | None = None
    presets: list[str] = Field(default_factory=lambda: ["quick", "paper", "demo"])
    example: ExamplePaths | None = None
    next_action: str
