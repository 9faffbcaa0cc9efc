"""The one next step of a run, of a new workspace and of a deletion, as data."""

from opd_mcp.planning.phases import cache_id_of
from opd_mcp.schemas.answers import ExamplePaths
from opd_mcp.schemas.next_action import NextAction, next_call, plan_call, resume_call
from opd_mcp.schemas.plans import Finding
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord
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
        step = _after_success(record, benchmarked="benchmark" in view.artifacts)
        warning = _worse_than_before(view)
        return step.with_why(f"{warning} {step.why}") if warning else step
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


def _worse_than_before(view: RunView) -> str | None:
    """What must be said of a run that did what it was asked to: a result below its baseline, beyond chance."""
    result = view.result or {}
    for comparison in result.get("comparisons", []):
        difference, low, high = comparison["accuracy_difference"]
        if high < 0 and comparison["baseline"] != result.get("teacher_row"):
            return (
                f"Beware: {comparison['candidate']} is less accurate than {comparison['baseline']} "
                f"({difference:+.3f} [{low:.3f}, {high:.3f}]); look at its alerts and metrics before you use it."
            )
    return None


def _after_success(record: RunRecord, *, benchmarked: bool) -> NextAction:
    run_id, inputs = record.run_id, record.request.inputs
    teacher = inputs.teacher.reference if inputs.teacher else None
    match record.request.kind:
        case "generate":
            return next_call("start_sft", "The responses are ready for SFT.", missing=["student"], responses=run_id)
        case "sft":
            why, missing = "The SFT student is ready; its teacher cache comes next.", ["teacher", "prompts"]
            return next_call("build_teacher_cache", why, missing=missing, student=run_id).filled(teacher=teacher)
        case "cache":
            student, cache_id = inputs.student.reference if inputs.student else None, cache_id_of(record.request.phases)
            call = next_call("start_distillation", "The cache is ready.", missing=["student"], cache_id=cache_id)
            return call.filled(student=student)
        case "distill" if not benchmarked:
            why, missing = "The student is ready and not yet measured.", ["prompts", "teacher"]
            return next_call("benchmark_student", why, missing=missing, model=run_id).filled(teacher=teacher)
        case "export":
            why, target = "The export is complete; its README.md says how to serve it.", inputs.export
            return next_call("sample_model", why, missing=["prompts"], model=target.destination if target else run_id)
        case kind:
            texts = "Read result: `samples` holds the texts."
            evidence = (
                "Read result: `scores` holds the evidence, `paths` the absolute paths of what was made; "
                f"the whole report is the resource opd://runs/{run_id}/report."
            )
            return NextAction(why=texts if kind == "sample" else evidence)
