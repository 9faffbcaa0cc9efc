"""What the entry points decide once and pass to the service: folders and slots."""

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_runtime_path

import opd_mcp
from opd_mcp.devices.environment import HubAccess


def default_lease_folder() -> Path:
    """The per-user, machine-wide folder of the device locks, shared by all workspaces."""
    # Clients start servers with few variables; without XDG_RUNTIME_DIR it warns about its (safe) fall-back.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return user_runtime_path("opd-mcp") / "leases"


def default_examples_directory() -> Path:
    """The folder `examples/`: next to the package in a checkout, inside it in a wheel."""
    package = Path(opd_mcp.__file__).resolve().parent
    checkout = package.parent / "examples"
    return checkout if checkout.is_dir() else package / "examples"


@dataclass(frozen=True)
class JobSettings:
    """Where leases and examples are, how many CPU runs fit at the same time, and what starts a worker.

    `teacher_hosts` are hosts besides this machine that a `teacher_url` may name; below `export_roots` models are
    exported, and for `hub_owners` uploaded to the Hub. Without `hub`, plans do not ask it for the sizes of models.
    """

    lease_folder: Path = field(default_factory=default_lease_folder)
    cpu_slots: int = field(default_factory=lambda: os.cpu_count() or 1)
    examples: Path = field(default_factory=default_examples_directory)
    worker_command: tuple[str, ...] = (sys.executable, "-P", "-m", "opd_mcp.cli", "worker")
    teacher_hosts: tuple[str, ...] = ()
    export_roots: tuple[Path, ...] = ()
    hub_owners: tuple[str, ...] = ()
    hub: HubAccess | None = None
