"""The rule of Lightning OPD: the teacher that scores must be the teacher of the SFT, and rollouts the student's own."""

from collections.abc import Callable
from pathlib import Path

from opd_mcp.identity.lineage import file_lineage, verified_lineage
from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.identity.signatures import MadeHere
from opd_mcp.schemas.cache import TeacherDelta
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim
from opd_mcp.schemas.plans import ConsistencyVerdict


def proven_claim(teacher: ModelIdentity) -> TeacherClaim:
    """The claim of an artifact that this teacher itself answered."""
    return TeacherClaim(basis="proven", name=teacher.name, identity=teacher)


def asserted_claim(declared: ModelIdentity | str) -> TeacherClaim:
    """The claim that a user makes with `declared_teacher`: a model whose files are here, or only a name."""
    if isinstance(declared, str):
        return TeacherClaim(basis="asserted", name=declared, identity=None)
    return TeacherClaim(basis="asserted", name=declared.name, identity=declared)


def vouched(claim: TeacherClaim | None, *, made_here: bool) -> TeacherClaim | None:
    """A lineage's claim as far as it goes: what a lineage that was not made here proves is only asserted."""
    if claim is None or made_here:
        return claim
    return claim.model_copy(update={"basis": "asserted"})


def sft_teacher(
    path: Path,
    declared: ModelIdentity | str | None = None,
    *,
    made_here: MadeHere,
    inspect: Callable[[Path], ModelFacts] = inspect_model,
) -> TeacherClaim | None:
    """Whose responses a model or data set comes from: its lineage's claim, held against its files, else the declared.

    The claim is proven where `made_here` says so of the directory, else asserted. `path` is a directory, or a data
    file whose directory has a lineage that names it. `inspect` may be a cache's. Raises IntegrityError
    `lineage_mismatch` when the files are not those of the lineage.
    """
    whole = path.is_dir()
    lineage = verified_lineage(path, inspect=inspect) if whole else file_lineage(path)
    if lineage is not None and lineage.sft_teacher is not None:
        return vouched(lineage.sft_teacher, made_here=made_here(path if whole else path.parent))
    return None if declared is None else asserted_claim(declared)


def consistency(teacher: ModelIdentity, sft_teacher: TeacherClaim | None, *, allowed: bool) -> ConsistencyVerdict:
    """Whether the teacher is the SFT teacher, and how that is known; `allowed` is the user's word, only recorded."""
    if sft_teacher is None:
        return ConsistencyVerdict(status="unknown", teacher=teacher, mismatch_allowed=allowed)
    if sft_teacher.identity is not None and "named" not in (teacher.remote, sft_teacher.identity.remote):
        same = sft_teacher.identity.same_model(teacher)
    else:
        same = _short_name(sft_teacher.name) == _short_name(teacher.name)
    return ConsistencyVerdict(
        status="consistent" if same else "mismatch",
        basis="asserted" if teacher.remote else sft_teacher.basis,
        teacher=teacher,
        sft_teacher=sft_teacher,
        mismatch_allowed=allowed,
    )


def require_consistent(
    teacher: ModelIdentity, sft_teacher: TeacherClaim | None, *, allowed: bool = False
) -> ConsistencyVerdict:
    """The verdict, when the distillation may go on.

    Raises ConsistencyError `teacher_mismatch` or `lineage_missing`, unless `allowed`.
    """
    verdict = consistency(teacher, sft_teacher, allowed=allowed)
    if verdict.status == "consistent" or allowed:
        return verdict
    if sft_teacher is None:
        raise ConsistencyError(
            "lineage_missing",
            f"Nothing says which teacher's responses the student was fine-tuned on; "
            f"distilling from {teacher.label()} is only sound if it was that one.",
            value=teacher.label(),
            fix="Give declared_teacher=… if you know the SFT teacher, "
            "or give sft_prompts so that the student is first fine-tuned on this teacher's responses.",
        )
    raise ConsistencyError(
        "teacher_mismatch",
        f"The student was fine-tuned on responses of {sft_teacher.label()} ({sft_teacher.basis}), "
        f"but the teacher of this distillation is {teacher.label()}.",
        value=teacher.label(),
        fix=f"Distill from {sft_teacher.label()}, "
        f"or give the student as it was before its SFT, with sft_prompts for {teacher.name} to answer, "
        "or accept the loss with allow_teacher_mismatch=True; the report records it. With the override "
        "distill.repair='residual' a part of the teacher's style is then taken off its cached scores (docs/method.md).",
    )


def delta_by_construction(teacher: ModelIdentity, sft_teacher: TeacherClaim | None) -> TeacherDelta | None:
    """Δ = 0 without a sample, where the SFT teacher is proven to be this teacher, which runs here; None elsewhere."""
    if sft_teacher is None or sft_teacher.basis != "proven" or sft_teacher.identity is None or teacher.remote:
        return None
    if not sft_teacher.identity.same_model(teacher):
        return None
    label = sft_teacher.identity.label()
    return TeacherDelta(sft_teacher=label, basis="by_construction", rows=0, tokens=0, mean_abs=0, over_one_nat=0)


def require_behaviour(cache_behaviour: ModelIdentity, student: ModelIdentity) -> None:
    """Raise ConsistencyError `behaviour_mismatch` unless the student is the policy that drew the cache's rollouts."""
    if cache_behaviour.same_model(student):
        return
    raise ConsistencyError(
        "behaviour_mismatch",
        f"The teacher cache holds rollouts of {cache_behaviour.label()}, "
        f"but the student of this distillation is {student.label()}.",
        value=student.label(),
        fix=f"Distill {cache_behaviour.label()}, or build a teacher cache for {student.label()}.",
    )


def _short_name(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()
