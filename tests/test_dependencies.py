"""Every package that opd_mcp imports is declared, and every declared one is imported."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROVIDERS = {"mlflow": "mlflow-skinny"}  # where the package is not installed
# those that opd_mcp itself imports
EXTRAS = ("int8", "tasks", "eval", "trackio", "wandb", "tensorboard", "mlflow")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(requirements: list[str]) -> set[str]:
    """The names of distributions, normalised."""
    return {normalised(re.match(r"[A-Za-z0-9._-]+", text)[0]) for text in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> list[set[str]]:
    """For each foreign package that a file of opd_mcp imports anywhere, the distributions that it may come from."""
    packages = set()
    for file in (ROOT / "opd_mcp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                packages.add(node.module.split(".")[0])
    known = packages_distributions()
    foreign = packages - set(sys.stdlib_module_names) - {"opd_mcp", "triton"}  # torch brings triton for CUDA
    return [set(map(normalised, known.get(package, [PROVIDERS.get(package, package)]))) for package in sorted(foreign)]


def test_what_is_imported_is_declared_and_the_other_way_round():
    core = declared(PROJECT["dependencies"])
    extras = declared([text for extra in EXTRAS for text in PROJECT["optional-dependencies"][extra]])
    assert [names for names in imported() if not names & (core | extras)] == []
    assert core - set().union(*imported()) == set()
