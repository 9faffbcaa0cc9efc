"""The record that a run begins with: its id, its name, the versions and the trace that it is part of."""

import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import opd_mcp
from opd_mcp.devices.hardware import Target
from opd_mcp.planning.phases import request_hash
from opd_mcp.planning.run_requests import model_label
from opd_mcp.schemas.plans import MethodEstimate
from opd_mcp.schemas.resolve import leaves, resolve_recipe
from opd_mcp.schemas.runs import ModelInput, RunRecord, RunRequest
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import new_id

RECORDED_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy")
ID_CHARACTERS = 32
NAME_CHARACTERS = 80
SECTIONS_OF_PHASE = {"generate_responses": "responses"}
SHARED_SECTIONS = frozenset({"runtime", "prompting"})
# The method is named anyway, and how many responses are drawn at a time follows from the device.
NOT_NAMED = frozenset({"distill.method", "responses.batch_size", "rollout.batch_size", "benchmark.batch_size"})


def new_record(request: RunRequest, target: Target, estimate: MethodEstimate | None) -> RunRecord:
    """A record with a fresh id, for a run on the target; no estimate while a model is still to be fetched."""
    labels = request.labels
    if labels.name is None:
        labels = labels.model_copy(update={"name": default_name(request)})
    return RunRecord(
        run_id=new_id(run_label(request)),
        created_at=utc_now(),
        request_hash=request_hash(request.kind, request.phases),
        request=request.model_copy(update={"labels": labels}),
        versions=installed_versions(),
        hardware=f"{target.name}, {platform.machine()}, {platform.system()}",
        expected_seconds=estimate.seconds if estimate else None,
        expected_memory_bytes=estimate.peak_memory_bytes if estimate else None,
        expected_phase_seconds={phase.phase: phase.seconds for phase in estimate.phases} if estimate else {},
        trace_context=current_trace(),
    )


def default_name(request: RunRequest) -> str:
    """What a run does, to which model, and how its recipe differs from its preset.

    E.g. `lightning qwen3-0.6b (quick), steps=200, seed=3`.
    """
    parts = [f"{run_action(request)} {model_label(run_model(request))[:ID_CHARACTERS]} ({request.recipe.preset})"]
    for part in setting_texts(changed_settings(request)):
        if len(", ".join([*parts, part])) > NAME_CHARACTERS - 3:
            return f"{', '.join(parts)}, …"
        parts.append(part)
    return ", ".join(parts)


def changed_settings(request: RunRequest) -> dict[str, object]:
    """The recipe keys that are not as in the preset, with their values: those of the run's phases, then shared ones."""
    sections = computed_sections(request)
    usual = dict(leaves(resolve_recipe(request.recipe.preset, {}).to_dict()))
    changed = {
        key: value
        for key, value in leaves(request.recipe.to_dict())
        if key.split(".")[0] in sections and key in usual and value != usual[key] and key not in NOT_NAMED
    }
    return dict(sorted(changed.items(), key=lambda item: item[0].split(".")[0] in SHARED_SECTIONS))


def computed_sections(request: RunRequest) -> set[str]:
    """The sections of the recipe that the run's phases read; the others say nothing of it."""
    sections = {SECTIONS_OF_PHASE.get(phase.name, phase.name) for phase in request.phases} | SHARED_SECTIONS
    if "distill" in sections and request.recipe.distill.method == "live":
        sections.add("rollout")  # how it draws its own
    return sections


def setting_texts(settings: dict[str, object]) -> list[str]:
    """Settings as `key=value`, by the last part of their keys where that says which one is meant."""
    last = Counter(key.rpartition(".")[2] for key in settings)
    shown = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in settings}
    return [
        f"{shown[key]}={value:g}" if type(value) is float else f"{shown[key]}={value}"
        for key, value in settings.items()
    ]


def run_label(request: RunRequest) -> str:
    """The readable part of a run's id: what it does, and to which model."""
    return f"{run_action(request)}-{model_label(run_model(request))[:ID_CHARACTERS]}"


def run_action(request: RunRequest) -> str:
    """What a run does: the method of a distillation, else its kind."""
    return request.recipe.distill.method if request.kind == "distill" else request.kind


def run_model(request: RunRequest) -> ModelInput | None:
    """The model that a run is about."""
    inputs = request.inputs
    return inputs.student or inputs.model or inputs.teacher


def installed_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"opd-mcp": opd_mcp.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed decides nothing
    return found


def current_trace() -> dict[str, str]:
    """The W3C trace context of the present span; empty where nothing is traced."""
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
