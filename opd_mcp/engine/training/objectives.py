"""From a distillation recipe to the objective of a row and the metrics of a step."""

from opd_mcp.engine.losses.rows import (
    CrossEntropy,
    RowObjective,
    Sampled,
    TopkForwardKl,
    TopkReverseKl,
    clipped_advantage,
)
from opd_mcp.engine.training.loop import Metrics
from opd_mcp.engine.training.step import StepResult
from opd_mcp.schemas.recipes import DistillRecipe

SFT_OBJECTIVE = CrossEntropy()


def sft_metrics(result: StepResult) -> Metrics:
    """Mean token log-prob of the teacher's responses."""
    return {"mean_logprob": float(result.logprobs.mean())} if result.tokens else {}


def distill_objective(recipe: DistillRecipe) -> RowObjective:
    """The estimator of the recipe as a loss of one row of logits with its gradient."""
    if recipe.estimator == "sampled":
        return Sampled(recipe.advantage_clip)
    if recipe.estimator == "topk_reverse_kl":
        return TopkReverseKl(recipe.topk, recipe.advantage_clip)
    return TopkForwardKl(recipe.topk)


def distill_metrics(result: StepResult, recipe: DistillRecipe) -> Metrics:
    """Reverse KL on the rollouts' tokens (k1, k3), advantage, drift from the behaviour policy.

    On live rollouts, and in the first step on cached ones, k1 and k3 estimate KL(π_θ‖π_T); later cached steps measure
    them on the behaviour policy's tokens. Definitions: docs/method.md.
    """
    if not result.tokens:
        return {}
    student = result.logprobs.double()
    teacher = result.columns["teacher_logprobs"].double()
    difference = teacher - student
    advantage = clipped_advantage(student, teacher, recipe.advantage_clip)
    metrics = {
        "reverse_kl_k1": float(-difference.mean()),
        "reverse_kl_k3": float((difference.clamp(max=20).exp() - difference - 1).mean()),
        "advantage_mean": float(advantage.mean()),
        "advantage_abs": float(advantage.abs().mean()),
        "advantage_clipped": float((difference.abs() > recipe.advantage_clip).double().mean()),
    }
    if "behaviour_logprobs" in result.columns:  # a converted cache has none
        ratio = (student - result.columns["behaviour_logprobs"].double()).clamp(-20, 20).exp()
        share = ratio.sum().square() / (len(ratio) * ratio.square().sum()).clamp_min(1e-300)
        metrics |= {"drift_mean": float(ratio.mean()), "effective_sample_share": float(share)}
    return metrics
