"""The immutable record of a new run: its id, what it was asked, and on what it will run."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import opd_mcp
from opd_mcp.devices.hardware import Target
from opd_mcp.identity.models import ModelCache, ModelFacts
from opd_mcp.planning.estimates import Estimator
from opd_mcp.planning.measured_speeds import measured_costs
from opd_mcp.planning.phases import request_hash
from opd_mcp.planning.workload import data_size, model_shape
from opd_mcp.schemas.plans import MethodEstimate
from opd_mcp.schemas.runs import ModelInput, RunRecord, RunRequest
from opd_mcp.store.journal import utc_now
from opd_mcp.store.workspace import Workspace, new_id

RECORDED_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy")
NAME_CHARACTERS = 32


def new_record(request: RunRequest, workspace: Workspace, models: ModelCache, target: Target) -> RunRecord:
    """A record with a fresh id, for a run on the target."""
    estimate = expected_cost(request, workspace, models, target)
    return RunRecord(
        run_id=new_id(run_label(request)),
        created_at=utc_now(),
        request_hash=request_hash(request.kind, request.phases),
        request=request,
        versions=installed_versions(),
        hardware=f"{target.name}, {platform.machine()}, {platform.system()}",
        expected_seconds=estimate.seconds if estimate else None,
        expected_memory_bytes=estimate.peak_memory_bytes if estimate else None,
        expected_phase_seconds={phase.phase: phase.seconds for phase in estimate.phases} if estimate else {},
        trace_context=current_trace(),
    )


def run_label(request: RunRequest) -> str:
    """The readable part of a run's id: what it does, and to which model."""
    inputs = request.inputs
    model = inputs.student or inputs.model or inputs.teacher
    prefix = request.recipe.distill.method if request.kind == "distill" else request.kind
    return f"{prefix}-{model_label(model)[:NAME_CHARACTERS]}"


def model_label(model: ModelInput | None) -> str:
    """A model's short name: its artifact, else the last part of its Hub id or path."""
    if model is None:
        return "run"
    return model.artifact_id or (model.hub_id or model.path or model.reference).rstrip("/").rsplit("/", 1)[-1]


def expected_cost(
    request: RunRequest, workspace: Workspace, models: ModelCache, target: Target
) -> MethodEstimate | None:
    """What the run is expected to take; None while a model of it is still to be fetched."""
    inputs = request.inputs
    first, second = inputs.student or inputs.model, inputs.teacher
    student, teacher = _facts(first or second, models), _facts(second or first, models)
    if student is None or teacher is None:
        return None
    method = request.recipe.distill.method
    estimator = Estimator(
        recipe=request.recipe,
        student=model_shape(student),
        teacher=model_shape(teacher),
        data=data_size(inputs),
        target=target,
        measured=measured_costs(workspace.artifacts),
    )
    return estimator.method(method, request.phases)


def installed_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"opd-mcp": opd_mcp.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed decides nothing
    return found


def _facts(model: ModelInput | None, models: ModelCache) -> ModelFacts | None:
    return models.inspect_model(Path(model.path)) if model and model.path else None


def current_trace() -> dict[str, str]:
    """The W3C trace context of the present span; empty where nothing is traced."""
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
