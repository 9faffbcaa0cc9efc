"""The arguments of starts: what a run shall be called, the plan's in a start's, and which do not go together."""

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.requests import (
    AssessOverhead,
    BenchmarkStudent,
    BuildTeacherCache,
    ExportStudent,
    GenerateTeacherResponses,
    PlanDistillation,
    SampleModel,
    StartDistillation,
    StartSft,
    Sweep,
)
from opd_mcp.schemas.runs import RunLabels

NEXT_TO_A_PLAN = {"plan_id", "benchmark", "name", "tags", "notes", "confirm"}
Labelled = (
    PlanDistillation
    | GenerateTeacherResponses
    | StartSft
    | BuildTeacherCache
    | StartDistillation
    | BenchmarkStudent
    | SampleModel
    | AssessOverhead
    | ExportStudent
    | Sweep
)


def labels_of(arguments: Labelled) -> RunLabels:
    """What the caller wants the run to be called; tags that are given twice count once."""
    return RunLabels(name=arguments.name, tags=list(dict.fromkeys(arguments.tags)), notes=arguments.notes)


def plan_arguments(arguments: StartDistillation) -> PlanDistillation:
    """The plan's arguments in those of a start; raises ArgumentError `invalid_argument` naming what is missing."""
    missing = [name for name in ("student", "teacher", "prompts") if getattr(arguments, name) is None]
    if missing:
        raise ArgumentError(
            "invalid_argument",
            f"Missing: {', '.join(missing)}.",
            fix="Give plan_id, or student + teacher + prompts, or student + cache_id.",
        )
    values = {name: getattr(arguments, name) for name in PlanDistillation.model_fields}
    return PlanDistillation(**values)


def require_cache_arguments(arguments: StartDistillation) -> None:
    """Raise ArgumentError `invalid_argument` for a start from a cache without a student, or with what is of no use."""
    if arguments.student is None:
        raise ArgumentError("invalid_argument", "cache_id needs a student.", fix="Give the cache's student as well.")
    if arguments.sft_prompts is not None:
        raise ArgumentError(
            "invalid_argument",
            "sft_prompts have no use with cache_id: the cache's student has had its SFT.",
            fix="Leave out sft_prompts.",
        )
    if arguments.baseline or arguments.seeds > 1:
        raise ArgumentError(
            "invalid_argument",
            "Baselines and seeds make runs of their own from the models and prompts, not from one cache.",
            fix="Give teacher and prompts instead of cache_id; what is made already is reused.",
        )


def require_nothing_but_plan(arguments: StartDistillation) -> None:
    """Raise ArgumentError `invalid_argument` for arguments next to plan_id that would change the plan."""
    fields = type(arguments).model_fields
    given = [
        name
        for name in arguments.model_fields_set - NEXT_TO_A_PLAN
        if getattr(arguments, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        raise ArgumentError(
            "invalid_argument",
            f"A plan_id stands for all its arguments; given next to it: {', '.join(sorted(given))}.",
            fix="Give plan_id alone (and benchmark, name, tags, notes), or leave plan_id out.",
        )
