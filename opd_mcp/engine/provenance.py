"""Lineage of what a stage made: its inputs' identities, its recipe, its files."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opd_mcp.engine.context import Context
from opd_mcp.identity.consistency import vouched
from opd_mcp.identity.lineage import data_hashes, verified_lineage, write_lineage
from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.identity import ArtifactKind, Lineage, ModelIdentity, Parent, TeacherClaim

RECORDED_PACKAGES = ("opd-mcp", "torch", "transformers", "numpy")


def full_identity(path: Path) -> ModelIdentity:
    """A model's identity with the hash over every byte of its weights."""
    return inspect_model(path).identity.model_copy(update={"weights_full": full_weights_hash(path)})


def claim_of(directory: Path, given: TeacherClaim | None, context: Context) -> TeacherClaim | None:
    """Whose responses a student was fine-tuned on, or responses are: the lineage's claim, else the given one.

    The claim of a lineage that was not made here is only asserted.
    """
    lineage = verified_lineage(directory, full=True)
    claim = lineage.sft_teacher if lineage else None
    return vouched(claim, made_here=context.made_here(directory)) if claim else given


def tokenizer_files(artifact: Path) -> list[str]:
    """The names of an artifact's tokenizer files, as `Lineage.files` has them."""
    return [f"tokenizer/{path.name}" for path in sorted((artifact / "tokenizer").iterdir())]


def record_lineage(
    output: Path,
    *,
    kind: ArtifactKind,
    stage: str,
    section: Schema,
    context: Context,
    parents: Sequence[Parent],
    files: Sequence[str] = (),
    **claims: Any,
) -> Lineage:
    """Write `output`/lineage.json for a finished stage; a model directory's own identity is added."""
    lineage = Lineage(
        kind=kind,
        stage=stage,
        recipe={
            stage: section.to_dict(),
            "runtime": context.runtime.to_dict(),
            "prompting": context.prompting.to_dict(),
        },
        model=full_identity(output) if kind == "model" else None,
        parents=list(parents),
        files=data_hashes(output, list(files)),
        versions={name: version(name) for name in RECORDED_PACKAGES if _installed(name)},
        **claims,
    )
    write_lineage(output, lineage)
    return lineage


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name.replace("-", "_")) is not None
