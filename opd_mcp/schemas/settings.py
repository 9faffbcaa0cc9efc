"""What the owner of a workspace settles in its `settings.toml`."""

from pydantic import Field

from opd_mcp.schemas.base import Schema


class Quotas(Schema):
    """Bounds on what the runs of a workspace may take; absent means unbounded."""

    max_running_runs: int | None = Field(None, ge=1, description="runs that are queued or running at a time")
    max_gpu_hours: float | None = Field(None, gt=0, description="hours that one run holds its device, all attempts")
    max_bytes: int | None = Field(None, ge=1, description="size of the whole workspace")


class WorkspaceSettings(Schema):
    """The file as a whole."""

    quotas: Quotas = Quotas()
