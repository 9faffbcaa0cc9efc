"""What a finished stage says of its output: lineage (the inputs' identities, settings, files) and cost."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from opd_mcp.engine.context import Context
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.models.nf4 import kernel_name
from opd_mcp.engine.runtime import hardware_name
from opd_mcp.identity.consistency import self_claim, vouched
from opd_mcp.identity.lineage import data_hashes, verified_lineage, write_lineage
from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.schemas.base import Schema, content_hash
from opd_mcp.schemas.identity import (
    AdapterOrigin,
    ArtifactKind,
    BaseForm,
    EngineFacts,
    Lineage,
    ModelIdentity,
    Parent,
    TeacherClaim,
)
from opd_mcp.schemas.recipes import AdapterRecipe
from opd_mcp.schemas.reports import StageCost, TrainedAdapter, TrainingSummary

RECORDED_PACKAGES = ("opd-mcp", "torch", "transformers", "numpy")


def engines_of(**made: EngineFacts | None) -> dict[str, EngineFacts] | None:
    """What a lineage says of the engines that made rows, by stage; None where this program's own did."""
    return {stage: facts for stage, facts in made.items() if facts is not None} or None


def full_identity(path: Path, form: BaseForm = "as_saved") -> ModelIdentity:
    """A model's identity with the hash over every byte of its weights."""
    identity = inspect_model(path, form=form).identity
    return identity.model_copy(update={"weights_full": full_weights_hash(path, form)})


def claim_of(directory: Path, given: TeacherClaim | None, context: Context) -> TeacherClaim | None:
    """Whose responses a student was fine-tuned on, or responses are: the lineage's claim, else the given one.

    The claim of a lineage that was not made here is only asserted. That the student is the teacher itself counts before
    a lineage; who asks holds the two against each other.
    """
    if given is not None and given.basis == "by_construction":
        return given
    lineage = verified_lineage(directory, full=True)
    claim = lineage.sft_teacher if lineage else None
    return vouched(claim, made_here=context.made_here(directory)) if claim else given


def require_self(claim: TeacherClaim | None, teacher: ModelIdentity, student: ModelIdentity) -> None:
    """Raise as `self_claim` where a student counts as its teacher and is not."""
    if claim is not None and claim.basis == "by_construction":
        self_claim(teacher, student)


def adapter_origin(student: LoadedModel, recipe: AdapterRecipe | None, context: Context) -> AdapterOrigin | None:
    """What a lineage says of the adapter that a student gets; None without one."""
    if recipe is None:
        return None
    quantization = student.facts.identity.quantization
    return AdapterOrigin(
        base=inspect_model(student.facts.weights_path).identity,
        rank=recipe.rank,
        scale=recipe.scale,
        start="continued" if recipe.continue_adapter else "zero",
        saved=recipe.saved_as(context.runtime.dtype),
        quantization=quantization,
        kernel=kernel_name(student.device) if quantization else None,
    )


def training_of(model: Path) -> TrainingSummary | None:
    """What the training of a model told; None where nothing does."""
    if (file := model / "training.json").is_file():
        with suppress(ValidationError):  # another program's file of that name says nothing
            return TrainingSummary.from_json(file.read_bytes())
    return None


def trained_adapter(model: Path) -> TrainedAdapter | None:
    """The adapter that the training of a model made, by its lineage; None where all weights were trained."""
    lineage = verified_lineage(model)
    if lineage is None or lineage.adapter is None:
        return None
    settings = (lineage.recipe.get(lineage.stage) or {}).get("adapter") or {}
    summary = training_of(model)
    return TrainedAdapter(
        stage=lineage.stage,
        rank=lineage.adapter.rank,
        scale=lineage.adapter.scale,
        targets=settings.get("targets"),
        trained_parameters=summary.trained_parameters if summary else None,
        parameters=summary.parameters if summary else None,
        start=lineage.adapter.start,
        saved=lineage.adapter.saved,
    )


def frozen_hash(origin: AdapterOrigin | None, student: Path) -> str | None:
    """The hash of what an adapter is trained on, with its settings; None without one."""
    if origin is None:
        return None
    settings = origin.model_copy(update={"kernel": None}).to_dict()  # kernels compute the same to rounding
    return content_hash({"origin": settings, "student": inspect_model(student).identity.weights})


def tokenizer_files(artifact: Path) -> list[str]:
    """The names of an artifact's tokenizer files, as `Lineage.files` has them."""
    return [f"tokenizer/{path.name}" for path in sorted((artifact / "tokenizer").iterdir())]


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from: its kind, the stage with its settings, the inputs, and the files to hash."""

    kind: ArtifactKind
    stage: str
    settings: Schema
    parents: Sequence[Parent]
    files: Sequence[str] = ()


def record_lineage(output: Path, made: Provenance, context: Context, **claims: Any) -> Lineage:
    """Write `output`/lineage.json for a finished stage; a model directory's own identity is added."""
    lineage = Lineage(
        kind=made.kind,
        stage=made.stage,
        recipe={
            made.stage: made.settings.to_dict(),
            "runtime": context.runtime.to_dict(),
            "prompting": context.prompting.to_dict(),
        },
        model=full_identity(output) if made.kind == "model" else None,
        parents=list(made.parents),
        files=data_hashes(output, list(made.files)),
        versions={name: version(name) for name in RECORDED_PACKAGES if find_spec(name.replace("-", "_")) is not None},
        **claims,
    )
    write_lineage(output, lineage)
    return lineage


def stage_cost(stage: str, started: float, tokens: int, device: torch.device, *, earlier: float = 0.0) -> StageCost:
    """The cost of a stage that ends now; `earlier` are the seconds of interrupted calls whose work was kept."""
    seconds = time.perf_counter() - started + earlier
    return StageCost(
        stage=stage, seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds, device=hardware_name(device)
    )
