"""Executors: where a run's worker may be started besides this machine, as `[executors.NAME]` in `settings.toml` says.

A tool call names an executor only. Its commands come from the settings file, which no tool writes.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from opd_mcp.schemas.base import Record, Schema

LOCAL = "local"
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,39}$"
ExecutorName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
# Not an option of the program that it is given to.
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\x00-][^\s\x00]*$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=2_000)]


class _Executor(Schema):
    """What every kind of executor is told."""

    memory_gb: float = Field(
        gt=0, allow_inf_nan=False, description="of each GPU; without GPUs, what a run may use of a machine's memory"
    )
    gpus: int = Field(0, ge=0, le=64, description="that a run gets on one machine")
    cpus: int = Field(1, ge=1, le=4096, description="processor cores that a run gets")
    python: str | None = Field(
        None, pattern="^/", description="absolute path of the Python there that has this program; default: this one"
    )
    setup: list[Line] = Field(
        default_factory=list, max_length=100, description="shell lines that run there before the worker"
    )
    lease_seconds: float = Field(
        90.0, ge=1, le=3600, allow_inf_nan=False, description="how long a worker may be silent before it counts as lost"
    )


class SlurmExecutor(_Executor):
    """A cluster whose `sbatch` is on the server's PATH."""

    kind: Literal["slurm"]
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit: Annotated[str, StringConstraints(pattern=r"^[0-9][0-9:-]*$")] | None = Field(
        None, description="as sbatch takes it, e.g. '1-12:00:00'; the run continues in another turn when it is over"
    )
    signal_seconds: int = Field(
        120, ge=1, le=3600, description="before the time limit, when the worker writes its checkpoint"
    )
    nodes: int = Field(1, ge=1, le=1024, description="machines that a run gets at most, where it has more devices")
    gpu_option: Literal["gres", "gpus-per-node"] = Field("gres", description="the option of sbatch that asks for GPUs")
    options: list[Annotated[str, StringConstraints(pattern="^--[a-z]")]] = Field(
        default_factory=list, max_length=50, description="further options of sbatch, e.g. '--constraint=a100'"
    )


class SshExecutor(_Executor):
    """Machines that `ssh` reaches without a question, and that share the workspace's folder."""

    kind: Literal["ssh"]
    hosts: list[Word] = Field(min_length=1, max_length=256, description="as ssh takes them; the least used gets a run")
    options: list[Line] = Field(
        default_factory=list, max_length=50, description="options of ssh, e.g. '-p' and '2222'; one per entry"
    )


class RayExecutor(_Executor):
    """A Ray cluster whose dashboard the server reaches."""

    kind: Literal["ray"]
    address: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")] = Field(
        description="of its dashboard, e.g. 'http://head:8265'"
    )
    token_file: str | None = Field(
        None, pattern="^/", description="absolute path of the file with its token, where the cluster asks for one"
    )
    resources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        max_length=50,
        description="further resources that a run gets, e.g. {'accelerator_type:H100' = 0.001}",
    )


ExecutorSettings = Annotated[SlurmExecutor | SshExecutor | RayExecutor, Field(discriminator="kind")]


class Placing(Schema):
    """On which executor an attempt is made, and how its life is told."""

    executor: str
    kind: str
    lease_seconds: float


class Claim(Record):
    """`attempts/NNNNN.claim`: who may make this attempt; `ticket` names the one job that does."""

    attempt: int
    placing: Placing
    ticket: str


class Submission(Record):
    """`attempts/NNNNN.job`: where the job of an attempt is, as its executor knows it."""

    job: str
    host: str | None = None


class Beginning(Record):
    """`attempts/NNNNN.begun`: the one process that makes the attempt; `life` counts the restarts of its job."""

    host: str
    pid: int
    life: int = 0


class Ending(Record):
    """`attempts/NNNNN.gone`: that nothing makes the attempt any more, and why."""

    cause: str


class Heartbeat(Schema):
    """`heartbeat.json`: written again and again by the process that makes an attempt."""

    attempt: int
    beat: int


class ExecutorReport(Schema):
    """An executor in `inspect_setup`."""

    name: str
    kind: str
    state: str = Field(description="what it says of itself now")
