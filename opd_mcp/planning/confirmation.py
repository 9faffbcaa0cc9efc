"""What a user must agree to before it happens: costly plans, a teacher mismatch, an upload, deletion.

A question is the same text for the same request, since the protocol may ask for it twice.
"""

from dataclasses import dataclass

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.schemas.plans import Plan


@dataclass(frozen=True)
class Question:
    """What to ask, and the id that an explicit `confirm` repeats."""

    confirm: str
    text: str


def plan_question(plan: Plan, gpu_hours: float) -> Question | None:
    """What to ask before a plan starts; None for one that is cheap and consistent, or blocked anyway."""
    if plan.blocking:
        return None
    reasons = [*mismatch_reason(plan), *cost_reason(plan, gpu_hours)]
    return Question(plan.plan_id, f"{' '.join(reasons)} Start {plan.plan_id}?") if reasons else None


def mismatch_reason(plan: Plan) -> list[str]:
    """That teacher and SFT teacher differ, where they do."""
    verdict = plan.consistency
    if verdict.status != "mismatch":
        return []
    teacher = verdict.teacher.label() if verdict.teacher else "the teacher"
    sft_teacher = verdict.sft_teacher.label() if verdict.sft_teacher else "another teacher"
    return [f"The student was fine-tuned on responses of {sft_teacher}, and would be distilled from {teacher}."]


def cost_reason(plan: Plan, gpu_hours: float) -> list[str]:
    """What the plan takes, where that is more than the threshold."""
    hours = max((estimate.seconds / 3600 for estimate in plan.estimates if estimate.method == plan.method), default=0.0)
    if plan.arms:
        hours = sum(arm.runs * (arm.seconds or 0.0) for arm in plan.arms) / 3600
    if hours <= gpu_hours:
        return []
    return [f"The plan takes about {hours:.2g} hours of the device (asked above {gpu_hours:g})."]


def cache_question(cache_id: str, allowed: bool) -> Question | None:
    """What to ask before a cache is built or used although its teacher may differ from the SFT teacher."""
    if not allowed:
        return None
    text = f"The teacher of {cache_id} may differ from the student's SFT teacher. Go on with {cache_id} all the same?"
    return Question(cache_id, text)


def sweep_question(sweep_id: str, runs: int, seconds: float, gpu_hours: float, mismatch: bool) -> Question | None:
    """What to ask before a sweep starts so many runs, which take so many seconds together."""
    reasons = []
    if mismatch:
        reasons.append("The teacher of the cache may differ from the student's SFT teacher.")
    if seconds > gpu_hours * 3600:
        reasons.append(
            f"The {runs} runs take about {seconds / 3600:.2g} hours of the device together (asked above {gpu_hours:g})."
        )
    return Question(sweep_id, f"{' '.join(reasons)} Start {sweep_id}?") if reasons and runs else None


def upload_question(destination: str, model: str, size: str) -> Question:
    """What to ask before a model is uploaded to the Hub."""
    text = f"Upload {model} ({size}) to a new private repository, {destination}, with the token in HF_TOKEN?"
    return Question(destination, text)


def run_deletion_question(run_id: str, parts: list[str]) -> Question:
    """What to ask before a run is deleted; the parts say what goes, what stays and what is lost."""
    return Question(run_id, f"Delete {run_id}? {' '.join(parts)} This cannot be undone.")


def deletion_question(artifact_id: str, kind: str, size: str) -> Question:
    """What to ask before an artifact is deleted."""
    return Question(artifact_id, f"Delete the {kind} artifact {artifact_id} ({size})? This cannot be undone.")


def is_confirmed(question: Question, confirm: str | None) -> bool:
    """Whether `confirm` answers the question; raises ArgumentError `confirm_needed` for another id."""
    if confirm is None:
        return False
    if confirm == question.confirm:
        return True
    raise ArgumentError(
        "confirm_needed",
        f"confirm names something else. {question.text}",
        value=confirm,
        nearest=[question.confirm],
        fix=f"Ask the user; after a yes call again with confirm='{question.confirm}'.",
    )


def confirm_needed(question: Question) -> ArgumentError:
    """The error for a client that cannot ask its user."""
    return ArgumentError(
        "confirm_needed",
        question.text,
        fix=f"Ask the user; after a yes call again with confirm='{question.confirm}'.",
    )
