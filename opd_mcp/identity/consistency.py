"""The rule of Lightning OPD: the teacher that scores must be the teacher of the SFT, and rollouts the student's own."""

from collections.abc import Callable
from pathlib import Path

from opd_mcp.identity.lineage import file_lineage, verified_lineage
from opd_mcp.identity.models import ModelFacts, inspect_model
from opd_mcp.identity.signatures import MadeHere
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.cache import CacheManifest, TeacherDelta
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.identity import ModelIdentity, TeacherClaim, TeacherContext
from opd_mcp.schemas.plans import ConsistencyVerdict


def proven_claim(teacher: ModelIdentity) -> TeacherClaim:
    """The claim of an artifact that this teacher itself answered."""
    return TeacherClaim(basis="proven", name=teacher.name, identity=teacher)


def teacher_context(system: str | None, rows: str | None) -> TeacherContext | None:
    """What a teacher sees that its student does not; None for nothing.

    `system` is the text of a system prompt for it alone, `rows` the hash of the prompts' own messages for it.
    """
    if system is None and rows is None:
        return None
    return TeacherContext(system=None if system is None else content_hash(system), rows=rows)


def asserted_claim(declared: ModelIdentity | str, context: TeacherContext | None = None) -> TeacherClaim:
    """The claim that a user makes with `declared_teacher`: a model whose files are here, or only a name.

    It covers the `context` of the teacher that it is to be held against.
    """
    if isinstance(declared, str):
        return TeacherClaim(basis="asserted", name=declared, identity=None)
    return TeacherClaim(basis="asserted", name=declared.name, identity=declared.model_copy(update={"context": context}))


def self_claim(teacher: ModelIdentity, student: ModelIdentity) -> TeacherClaim:
    """The claim of a student that is its teacher without the teacher's context.

    Raises ConsistencyError `not_one_model`, or `nothing_to_learn` where the teacher sees no more than the student.
    """
    if not teacher.same_model(student) or teacher.remote:
        raise ConsistencyError(
            "not_one_model",
            f"sft.skip is for a student that is its teacher: the student is {student.label()}, the teacher "
            f"{teacher.label()}.",
            value=student.label(),
            fix="Leave out 'sft.skip': the student is then fine-tuned on the teacher's responses first. Or give one "
            "model as student and as teacher.",
        )
    if teacher.context is None:
        raise ConsistencyError(
            "nothing_to_learn",
            f"Student and teacher are both {teacher.label()} and see the same prompts: every token's advantage is 0.",
            value=student.label(),
            fix="Let the teacher see more: 'prompting.teacher_system', or `teacher_messages` in the prompts.",
        )
    return TeacherClaim(basis="by_construction", name=teacher.name, identity=teacher)


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


def inherited(claim: TeacherClaim | None) -> TeacherClaim | None:
    """The claim that a distilled student has of its π_ref: where that was the teacher itself, it is proven."""
    if claim is None or claim.basis != "by_construction":
        return claim
    return claim.model_copy(update={"basis": "proven"})


def cache_claim(manifest: CacheManifest, student: TeacherClaim | None) -> TeacherClaim | None:
    """Whose responses a cache's student learnt from: the cache's own claim where it is its teacher, else the student's.

    `student` is its own claim.
    """
    own = manifest.sft_teacher
    is_self = own is not None and own.basis == "by_construction" and manifest.teacher.same_model(manifest.behaviour)
    return own if is_self else student


# one of the ways out of a mismatch, and what it was worth where it was measured
REPAIR = (
    "With that, the override distill.repair='residual' takes a part of the teacher's style off the cached scores of "
    "method='lightning' with the estimator 'sampled'; where it was measured it won back little (docs/results.md)."
)


def consistency(teacher: ModelIdentity, sft_teacher: TeacherClaim | None, *, allowed: bool) -> ConsistencyVerdict:
    """Whether the teacher is the SFT teacher, and how that is known; `allowed` is the user's word, only recorded."""
    if sft_teacher is None:
        return ConsistencyVerdict(status="unknown", teacher=teacher, mismatch_allowed=allowed)
    if sft_teacher.identity is not None and "named" not in (teacher.remote, sft_teacher.identity.remote):
        same = same_teacher(sft_teacher.identity, teacher)
    else:
        same = _short_name(sft_teacher.name) == _short_name(teacher.name)
    if sft_teacher.identity is not None:  # a mere name says nothing of what its bearer saw
        same = same and sft_teacher.identity.same_context(teacher)
    return ConsistencyVerdict(
        status="consistent" if same else "mismatch",
        basis="asserted" if teacher.remote else sft_teacher.basis,
        teacher=teacher,
        sft_teacher=sft_teacher,
        mismatch_allowed=allowed,
    )


def same_teacher(sft_teacher: ModelIdentity, teacher: ModelIdentity) -> bool:
    """Whether every row's teacher is the one that answered such rows for the SFT, one or several by domain."""
    answered, scores = sft_teacher.members, teacher.members
    if scores is None:
        return all(member.same_model(teacher) for member in (answered or {"": sft_teacher}).values())
    by_domain = answered or dict.fromkeys(scores, sft_teacher)
    return all(domain in by_domain and by_domain[domain].same_model(member) for domain, member in scores.items())


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
    if sft_teacher.identity is not None and not sft_teacher.identity.same_context(teacher):
        raise context_mismatch(teacher, sft_teacher)
    first = f"Distill from {sft_teacher.label()}"
    if sft_teacher.identity is None:  # a mere name may be that of an API that returns nothing but text
        first = (
            f"If {sft_teacher.name} can score tokens, distill from it; for one that only returns text, "
            "docs/guide/api-teachers.md has the ways on."
        )
    raise ConsistencyError(
        "teacher_mismatch",
        f"The student was fine-tuned on responses of {sft_teacher.label()} ({sft_teacher.basis}), "
        f"but the teacher of this distillation is {teacher.label()}.",
        value=teacher.label(),
        fix=f"{first}, or give the student as it was before its SFT, with sft_prompts for {teacher.name} to answer, "
        f"or accept the loss with allow_teacher_mismatch=True; the report records it. {REPAIR}",
    )


def context_mismatch(teacher: ModelIdentity, sft_teacher: TeacherClaim) -> ConsistencyError:
    """The error for a teacher that saw something else when it answered for the SFT than it sees now."""
    assert sft_teacher.identity is not None
    seen = [_seen(identity.context) for identity in (sft_teacher.identity, teacher)]
    return ConsistencyError(
        "teacher_mismatch",
        f"For the SFT the teacher {sft_teacher.label()} answered with {seen[0]}; in this distillation "
        f"{teacher.label()} sees {seen[1]}.",
        value=teacher.label(),
        fix="Let it see the same in both: the same 'prompting.teacher_system', and `teacher_messages` in the SFT "
        "prompts as in the distillation prompts, for a student as it was before its SFT. Or accept the loss with "
        f"allow_teacher_mismatch=True; the report records it. {REPAIR}",
    )


def _seen(context: TeacherContext | None) -> str:
    parts = [
        f"a system prompt of its own ({context.system[:6]})" if context and context.system else "",
        "messages of its own per prompt" if context and context.rows else "",
    ]
    return " and ".join(filter(None, parts)) or "the student's prompts"


def delta_by_construction(teacher: ModelIdentity, sft_teacher: TeacherClaim | None) -> TeacherDelta | None:
    """Δ = 0 without a sample, where the SFT teacher is proven to be this teacher, which runs here; None elsewhere."""
    if sft_teacher is None or sft_teacher.basis == "asserted" or sft_teacher.identity is None or teacher.remote:
        return None
    if not same_teacher(sft_teacher.identity, teacher) or not sft_teacher.identity.same_context(teacher):
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
