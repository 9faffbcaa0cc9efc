"""The one next step of a run, of a new workspace and of a deletion, as data."""

from collections.abc import Mapping
from typing import Any

from opd_mcp.grading.remedies import changes_text, remedy
from opd_mcp.grading.verdicts import TRAINING_ALERTS, Gain
from opd_mcp.planning.phases import cache_id_of
from opd_mcp.schemas.answers import ExamplePaths
from opd_mcp.schemas.next_action import NextAction, next_call, plan_call, resume_call
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.reports import Verdict
from opd_mcp.schemas.resolve import changed_settings
from opd_mcp.schemas.runs import ACTIVE_STATES, DataInput, ExportTarget, ModelInput, RunRecord
from opd_mcp.store.run_view import RunView
from opd_mcp.supervisor.liveness import worker_alert

# Failures that the same run may get over; any other one comes back unless something is changed first.
RESUME_HELPS = frozenset(
    {
        *("worker_lost", "worker_terminated", "internal_error", "launch_failed"),
        *("not_enough_disk", "offline", "teacher_unreachable", "device_unavailable"),
        *("quota_exceeded", "unknown_setting", "invalid_setting"),
    }
)
WAIT_SECONDS = 25
SAID_BY_ARGUMENTS = frozenset({"distill.method", "distill.estimator"})


def next_action(view: RunView, record: RunRecord) -> NextAction:
    """What to do next about a run."""
    run_id = record.run_id
    if view.state in ACTIVE_STATES:
        why = f"The run is {view.state}."
        process = worker_alert(view)
        if process is not None and view.cancel_requested is None:
            why = f"{process.message} Tell the user, unless it was stopped on purpose."
        if view.cancel_requested is not None:
            why = "A cancellation is pending, do not ask again; wait until the state is cancelled."
        return next_call("get_run_status", why, run_id=run_id, wait_seconds=WAIT_SECONDS)
    if view.state == "succeeded":
        verdict = run_verdict(view, record)
        return verdict.next_action if verdict else _after_success(record)
    error = view.error
    if view.state == "failed" and error is not None and error.code not in RESUME_HELPS:
        call = (error.call or NextAction()).filled(run_id=run_id)
        return call.with_why(error.fix)
    return resume_call(run_id).with_why(f"The run is {view.state}; it resumes from its last checkpoint.")


def first_step(example: ExamplePaths | None, problem: Finding | None) -> NextAction:
    """What to do first in a workspace: resolve what is wrong with its settings, or plan the example."""
    if problem is not None:
        return next_call("inspect_setup", f"Resolve {problem.code} and look again: {problem.fix}")
    if example is None:
        return plan_call("Plan a distillation.")
    return next_call(
        "plan_distillation",
        "Plan the example task.",
        student=example.student,
        teacher=example.teacher,
        prompts=example.prompts_opd,
        sft_prompts=example.prompts_sft,
        eval_prompts=example.prompts_eval,
        preset="demo",
    )


def after_deletion() -> NextAction:
    """What to do after an artifact was deleted."""
    return next_call("list_artifacts", "See what is left.")


def run_verdict(view: RunView, record: RunRecord) -> Verdict | None:
    """The verdict on a run that has ended well, its next step with the run's own arguments.

    `unknown` for a training that measured nothing. None for a run that neither trained nor measured a student.
    """
    if view.state != "succeeded":
        return None
    result = view.result or {}
    if (known := result.get("verdict")) is not None:
        verdict = Verdict.model_validate(known)
        step = _with_arguments(verdict, record)
        return verdict.model_copy(update={"next_action": step})
    if (comparison := _compared(result)) is not None:
        return _earlier_verdict(comparison, record)
    if record.request.kind not in ("sft", "distill"):
        return None
    told = next((alert for alert in reversed(view.alerts) if alert.code in TRAINING_ALERTS), None)
    return Verdict(
        judgement="unknown",
        sentence="the student is trained and not measured: whether it gained anything is not known.",
        cause=None if told is None else f"{told.code}: {told.message}",
        next_action=_after_success(record),
    )


def _compared(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first comparison with another model than the teacher, of a result that an earlier version wrote."""
    others = (pair for pair in result.get("comparisons", []) if pair["baseline"] != result.get("teacher_row"))
    return next(others, None)


def _earlier_verdict(comparison: Mapping[str, Any], record: RunRecord) -> Verdict:
    difference, low, high = comparison["accuracy_difference"]
    gain = Gain("accuracy", 0.0, 0.0, (difference, low, high))
    said = f"accuracy of {comparison['candidate']} minus {comparison['baseline']}: "
    return Verdict(
        judgement=gain.judgement,
        sentence=f"{said}{difference:+.3f} [{low:+.3f}, {high:+.3f}].",
        next_action=_after_success(record, benchmarked=True),
    )


def _with_arguments(verdict: Verdict, record: RunRecord) -> NextAction:
    """The verdict's next step with what the run was given, and with what lifts the cause of a bad result.

    A second round begins with the student that the run made.
    """
    action = verdict.next_action
    inputs, recipe = record.request.inputs, record.request.recipe
    sources = {role: getattr(inputs, role) for role in ("student", "teacher", "prompts", "sft_prompts", "eval_prompts")}
    given: dict[str, Any] = {
        role: source.given if isinstance(source, ModelInput) else _data_reference(source)
        for role, source in sources.items()
        if source is not None
    }
    if verdict.judgement == "better":
        given |= {"student": record.run_id}
        given.pop("sft_prompts", None)
    if action.tool != "plan_distillation":
        measured = {"model": record.run_id, "prompts": given.get("eval_prompts", given.get("prompts"))}
        return action.filled(**(measured if action.tool == "benchmark_student" else given))
    if {"student", "teacher", "prompts"} <= given.keys():  # else it began from a cache, or from responses
        method = "sft" if record.request.kind == "sft" else recipe.distill.method
        given |= {"method": method, "estimator": recipe.distill.estimator, "preset": recipe.preset}
    stages = [phase.name for phase in record.request.phases if phase.name in ("sft", "distill")]
    changes = remedy(verdict, recipe, stages, inputs.student.parameters if inputs.student else None)
    settings = changed_settings(recipe) | changes
    overrides = {key: value for key, value in settings.items() if key not in SAID_BY_ARGUMENTS}
    why = " ".join(part for part in (action.why, changes_text(changes, recipe)) if part)
    missing = [name for name in action.missing or () if name not in given] or None
    return action.model_copy(update={"arguments": given | {"overrides": overrides}, "missing": missing, "why": why})


def _data_reference(data: DataInput) -> str | None:
    return data.artifact_id if data.reference == "inline" else data.reference


def _after_export(run_id: str, target: ExportTarget | None) -> NextAction:
    if target is not None and target.hub_id is not None:
        return NextAction(why="The model is uploaded, private; its card there says how to serve it.")
    why = "The export is complete; its README.md says how to serve it."
    if target is not None and target.format == "gguf":
        return NextAction(why=why)
    return next_call("sample_model", why, missing=["prompts"], model=target.destination if target else run_id)


def _after_preparation(record: RunRecord) -> NextAction:
    run_id, inputs = record.run_id, record.request.inputs
    if record.request.kind == "generate":
        return next_call("start_sft", "The responses are ready for SFT.", missing=["student"], responses=run_id)
    sources = {role: getattr(inputs, role) for role in ("student", "teacher", "prompts")}
    given = {role: source.reference for role, source in sources.items() if source.reference != "inline"}
    why = "Read result: `overhead` has the costs and the diagnosis; plans now estimate by these speeds."
    return next_call("plan_distillation", why, missing=[role for role in sources if role not in given], **given)


def _after_success(record: RunRecord, *, benchmarked: bool = False) -> NextAction:
    run_id, inputs = record.run_id, record.request.inputs
    teacher = inputs.teacher.given if inputs.teacher else None
    match record.request.kind:
        case "generate" | "assess":
            return _after_preparation(record)
        case "sft":
            why, missing = "The SFT student is ready; its teacher cache comes next.", ["teacher", "prompts"]
            return next_call("build_teacher_cache", why, missing=missing, student=run_id).filled(teacher=teacher)
        case "cache":
            student, cache_id = inputs.student.reference if inputs.student else None, cache_id_of(record.request.phases)
            call = next_call("start_distillation", "The cache is ready.", missing=["student"], cache_id=cache_id)
            return call.filled(student=student)
        case "distill" if not benchmarked:
            why, missing = "The student is ready and not yet measured.", ["prompts", "teacher"]
            one = teacher if isinstance(teacher, str) else None  # it measures against one at a time
            return next_call("benchmark_student", why, missing=missing, model=run_id).filled(teacher=one)
        case "export":
            return _after_export(run_id, inputs.export)
        case kind:
            texts = "Read result: `samples` holds the texts."
            evidence = (
                "Read result: `scores` holds the evidence, `paths` the absolute paths of what was made; "
                f"the whole report is the resource opd://runs/{run_id}/report."
            )
            return NextAction(why=texts if kind == "sample" else evidence)
