"""Builds wheel and sdist, installs the wheel in a fresh environment, and uses it outside of the checkout.

Run: `make test-wheel` or `python tools/docs/wheel.py [--keep DIR]`. The environment sees this Python's packages, so
nothing is downloaded, but not its editable opd-mcp: what runs is the wheel. Prints one JSON line; exits with 1 if a
step fails. Needs hatchling (extra `dev`).
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

SDIST_FILES = ("pyproject.toml", "README.md", "server.json", "opd_mcp/cli/__init__.py", "examples/arithmetic/sft.jsonl")


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of this checkout."""
    run([sys.executable, "-m", "hatchling", "build", "--directory", str(folder)], cwd=ROOT)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def require_sdist(sdist: Path) -> int:
    """The number of files of the sdist; ends the script where one of `SDIST_FILES` is missing."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in SDIST_FILES if name not in names]
    if missing:
        sys.exit(f"{sdist.name} lacks {', '.join(missing)}")
    return len(names)


def installed(wheel: Path, folder: Path) -> Path:
    """The `opd-mcp` of a new environment with the wheel, and with this Python's packages behind it."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    where = ["--python", str(python), "--disable-pip-version-check", "--quiet"]
    run([sys.executable, "-m", "pip", *where, "install", "--no-deps", "--no-index", str(wheel)], cwd=folder)
    # Written after the installation, which would take the editable opd-mcp behind it for the one to be installed. Lines
    # of a .pth file add a folder without the .pth files in it, so the editable one stays hidden.
    (purelib / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "opd-mcp"


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints; ends the script where it fails."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    """Build, install, use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="write wheel and sdist to this folder, and leave them there")
    arguments = parser.parse_args()
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with tempfile.TemporaryDirectory(prefix="opd-wheel-") as name:
        folder = Path(name)
        packages = arguments.keep or folder / "dist"
        packages.mkdir(parents=True, exist_ok=True)
        wheel, sdist = built(packages.resolve())
        files = require_sdist(sdist)
        command = str(installed(wheel, folder / "venv"))
        (folder / "runtime").mkdir(mode=0o700)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OPD_HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder / "runtime")}
        version = run([command, "--version"], folder, environment).strip()
        if version != f"opd-mcp {expected}":
            sys.exit(f"the wheel says {version!r}, pyproject.toml {expected}")
        begun = time.monotonic()
        shown = folder / "demo.json"
        run([command, "demo", "--quick", "--json", str(shown)], folder, environment)
        arms = json.loads(shown.read_text(encoding="utf-8"))["arms"]
        seconds = round(time.monotonic() - begun, 1)
        found = {"wheel": wheel.name, "sdist_files": files, "demo_arms": sorted(arms), "demo_seconds": seconds}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
