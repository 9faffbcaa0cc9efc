"""What an export is asked to write: its destination, its form, and what the model's card tells of its making."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from opd_mcp.identity.adapters import is_adapter
from opd_mcp.planning.asked_recipes import usable_recipe
from opd_mcp.planning.confirmation import Question, upload_question
from opd_mcp.planning.costs.run_workload import exported_bytes
from opd_mcp.planning.phases import PhaseChain
from opd_mcp.planning.references import References, ResolvedModel
from opd_mcp.planning.run_requests import RequestBuilder, model_label
from opd_mcp.schemas.errors import ConsistencyError, OpdError, converter_missing
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import ExportFormat
from opd_mcp.schemas.reports import BenchmarkReport
from opd_mcp.schemas.requests import ExportStudent
from opd_mcp.schemas.runs import DataInput, DataOrigin, ExportTarget, ModelInput, ModelOrigin, RunInputs, RunRequest
from opd_mcp.schemas.texts import byte_size
from opd_mcp.store.roots import HUB_PREFIX, ExportRoots
from opd_mcp.store.workspace import read_settings

ADAPTER_FOLDER = "adapter"
REPORT_FILE = "report.json"
MAX_REPORTS = 200
"""The newest reports of a workspace in which figures are looked for."""
MAX_ROUNDS = 8
"""How many trainings a model's making is followed back."""
DATA_ROLES = ("sft_prompts", "prompts", "responses", "cache")


def export_request(builder: RequestBuilder, roots: ExportRoots, arguments: ExportStudent) -> RunRequest:
    """A model is written below an export root or uploaded to the Hub, on the CPU.

    Raises PathError as `ExportRoots.destination` and `References.model`, ConsistencyError `no_adapter`, ResourceError
    `missing_package`.
    """
    references = builder.references
    if arguments.format == "gguf" and read_settings(references.workspace).export.gguf_converter is None:
        raise converter_missing()
    destination = roots.destination(arguments.destination)
    model = references.model(arguments.model)
    require_form(model, arguments.format)
    origins = list(_made_with(references, model.input))
    models = [origin for origin in origins if isinstance(origin, ModelOrigin)]
    data = [origin for origin in origins if isinstance(origin, DataOrigin)]
    target = ExportTarget(
        destination=destination,
        format=arguments.format,
        report=newest_report(references, model.input.identity),
        models=list(dict.fromkeys(models)),
        data=list(dict.fromkeys(data)),
    )
    recipe = usable_recipe("quick", {"runtime.device": "cpu"})
    inputs = RunInputs(model=model.input, export=target)
    return builder.request("export", recipe, inputs, PhaseChain(recipe, inputs).export().phases)


def export_question(builder: RequestBuilder, roots: ExportRoots, arguments: ExportStudent) -> Question | None:
    """What the user must agree to before a model is uploaded; None for a folder. Raises as `export_request`."""
    if not arguments.destination.startswith(HUB_PREFIX):
        return None
    inputs = export_request(builder, roots, arguments).inputs
    return upload_question(arguments.destination, arguments.model, byte_size(exported_bytes(inputs)))


def require_form(model: ResolvedModel, form: ExportFormat) -> None:
    """Raise ConsistencyError `no_adapter` where an adapter is asked for that a model does not have."""
    if form != "adapter" or model.facts is None:
        return
    if model.facts.adapter is None and not is_adapter(model.facts.path / ADAPTER_FOLDER):
        raise ConsistencyError(
            "no_adapter",
            "This model has no adapter of its own: all its weights were trained, or it was saved merged only.",
            value=model.input.reference,
            fix="Export it whole (format='input'), or train with distill.adapter.save='both'.",
        )


def newest_report(references: References, identity: ModelIdentity | None) -> str | None:
    """The directory of the newest report of the workspace that measured this model first; None without one."""
    if identity is None:
        return None
    folder = references.workspace.artifacts_of("report")
    found = sorted(folder.glob(f"*/{REPORT_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in found[:MAX_REPORTS]:
        with suppress(ValueError, OSError):  # a damaged one, or one of another version, has no figures to show
            report = BenchmarkReport.from_json(file.read_bytes())
            if report.models[0].identity.same_model(identity):
                return str(file.parent)
    return None


def _made_with(references: References, model: ModelInput | None) -> Iterator[ModelOrigin | DataOrigin]:
    """The models and data of the trainings that made a model, from the last one back to the student they began with."""
    for _ in range(MAX_ROUNDS):
        made_by = None
        with suppress(OpdError):  # a run whose record cannot be read tells nothing
            made_by = references.inputs_of_artifact(model.artifact_id) if model and model.artifact_id else None
        if made_by is None:
            return
        if made_by.teacher is not None:
            yield _model_origin(references, "teacher", made_by.teacher)
        for role in DATA_ROLES:
            given: DataInput | None = getattr(made_by, role)
            if given is not None:
                name = given.hub_id or given.artifact_id or Path(given.path or given.reference).name
                yield DataOrigin(role=role, name=name, rows=given.rows, sha256=given.sha256)
        model = made_by.student
        if model is not None and model.artifact_id is None:
            yield _model_origin(references, "student", model)


def _model_origin(references: References, role: Literal["teacher", "student"], model: ModelInput) -> ModelOrigin:
    path = references.allowed(model.path)
    return ModelOrigin(role=role, name=model.hub_id or model_label(model), path=str(path) if path else None)
