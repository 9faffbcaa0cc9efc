"""Teachers that are more than one other model: several by domain, and a student that is its own teacher."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from opd_mcp.identity.consistency import self_claim
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.panels import panel_identity, require_domains
from opd_mcp.planning.checks import Findings, PlanInputs, differing_tokens
from opd_mcp.planning.references import References, ResolvedModel, ResolvedPrompts
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, OpdError, PathError
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.recipes import Method, Recipe, base_form
from opd_mcp.schemas.runs import ModelInput


def resolved_teacher(references: References, reference: str | Mapping[str, str]) -> ResolvedModel:
    """The model that teaches, or several by domain as one, whose tokenizer is that of the largest of them.

    Raises as `References.model` and `panel_identity`, and PathError `not_found` for one of several that is not here.
    """
    if isinstance(reference, str):
        return references.model(reference)
    if not reference:
        raise ArgumentError("invalid_argument", "teacher names no model.", fix="Give a model, or models by domain.")
    members = {domain: references.model(given) for domain, given in sorted(reference.items())}
    identities = {}
    for domain, member in members.items():
        if member.facts is None:
            raise PathError(
                "not_found",
                f"The teacher of {domain} is not here; of several teachers none is fetched from the Hub.",
                value=reference[domain],
                fix="Give its path, or fetch it by a run that has it as its only model.",
            )
        identities[domain] = member.facts.identity
    largest = max(members.values(), key=lambda member: member.input.parameters or 0)
    combined = ModelInput(
        reference=", ".join(f"{domain}: {given}" for domain, given in sorted(reference.items())),
        path=largest.input.path,
        identity=panel_identity(identities),
        parameters=largest.input.parameters,
        members={domain: member.input for domain, member in members.items()},
    )
    return ResolvedModel(combined, largest.facts)


def require_teachers_usable(
    teacher: ResolvedModel, student: ResolvedModel | None, recipe: Recipe, method: Method
) -> None:
    """Raise ArgumentError `invalid_argument` for what several teachers cannot do.

    Raises ConsistencyError `tokenizer_mismatch` for one whose tokens are not the student's.
    """
    members = teacher.input.members
    if not members:
        return
    for key, engine in (("responses", recipe.responses.engine), ("score", recipe.score.engine)):
        if engine is not None:
            raise ArgumentError(
                "invalid_argument",
                f"{key}.engine serves one model, and there are {len(members)} teachers.",
                value=engine,
                fix=f"Leave out '{key}.engine': this program's own engine loads one teacher after the other.",
            )
    if method == "live":
        raise ArgumentError(
            "invalid_argument",
            "Live distillation would hold every teacher in memory at every step.",
            value=method,
            fix="Use method='lightning', which loads one teacher after the other, once.",
        )
    for member in members.values():
        if student is not None and student.facts is not None:
            differing_tokens(ResolvedModel(member, inspect_model(Path(str(member.path)))), student)


def require_own_prompts(teacher: ResolvedModel, prompts: ResolvedPrompts | None, what: str = "prompts") -> None:
    """Raise DataError `unknown_domain` for prompts that are here and belong to none of several teachers."""
    if teacher.input.members and prompts is not None and prompts.input.path is not None:
        require_domains(prompts.scan.domains, teacher.input.members, what)


def judge_teachers(inputs: PlanInputs, recipe: Recipe, method: Method, sft: bool, found: Findings) -> None:
    """Block what several teachers cannot do, prompts that are no teacher's, and weights of domains that there are not.

    `sft` says whether the run has an SFT.
    """
    answered = {"sft_prompts": inputs.sft_prompts} if sft else {}
    try:
        require_teachers_usable(inputs.teacher, inputs.student, recipe, method)
        for name, given in ({"prompts": inputs.prompts} | answered).items():
            require_own_prompts(inputs.teacher, given, name)
        if method != "sft" and inputs.prompts.input.path is not None:
            require_known_weights(recipe, inputs.prompts)
    except OpdError as error:
        found.blocking.append(Finding.of_error(error))


def require_known_weights(recipe: Recipe, prompts: ResolvedPrompts) -> None:
    """Raise ArgumentError `invalid_argument` for weights of domains that no prompt has."""
    known = {name for name in prompts.scan.domains if name is not None}
    unknown = sorted((recipe.distill.domain_weights or {}).keys() - known)
    if unknown:
        raise ArgumentError(
            "invalid_argument",
            f"distill.domain_weights names {', '.join(unknown)}, and the prompts are of "
            f"{', '.join(sorted(known)) or 'no domain'}.",
            value=unknown[0],
            nearest=sorted(known)[:3],
            fix="Name domains that the prompts have in `teacher_domain`.",
        )


def require_self_claim(teacher: ResolvedModel, student: ResolvedModel, recipe: Recipe) -> ResolvedModel:
    """The student with the claim that it is its teacher; raises ConsistencyError as `self_claim`."""
    if teacher.input.identity is None or student.facts is None:
        raise ConsistencyError(
            "not_one_model",
            "sft.skip is for a student that is its teacher, and a model of the two is not here yet.",
            value=student.input.reference,
            fix="Fetch the model first and give its path, or leave out 'sft.skip'.",
        )
    held = inspect_model(student.facts.path, form=base_form(recipe.distill.adapter)).identity
    claim = self_claim(teacher.input.identity, held)
    return replace(student, input=student.input.model_copy(update={"sft_teacher": claim}))


def with_self_claim(teacher: ResolvedModel, student: ResolvedModel, recipe: Recipe, found: Findings) -> ResolvedModel:
    """As `require_self_claim`; what refuses it is `blocking`."""
    try:
        return require_self_claim(teacher, student, recipe)
    except ConsistencyError as error:
        found.blocking.append(Finding.of_error(error))
        return student
