"""A watch on the advantage clip: a clip that binds on most tokens has replaced the teacher's judgement by its sign."""

from collections import deque

from opd_mcp.engine.context import Context
from opd_mcp.engine.training.loop import Metrics
from opd_mcp.engine.training.objectives import distill_metrics
from opd_mcp.engine.training.step import StepResult
from opd_mcp.schemas.recipes import DistillRecipe

WATCHED_STEPS = 10
ALERT_SHARE = 0.5


class ClipWatch:
    """The metrics of a distillation step; alerts once when most advantages of the last steps were clipped."""

    def __init__(self, recipe: DistillRecipe, context: Context) -> None:
        self._recipe, self._reporter = recipe, context.reporter
        self._shares: deque[float] = deque(maxlen=WATCHED_STEPS)
        # the forward KL has no advantage, so its clip means nothing
        self._watching = recipe.estimator != "topk_forward_kl"

    def __call__(self, result: StepResult) -> Metrics:
        """`distill_metrics` of the step."""
        metrics = distill_metrics(result, self._recipe)
        self._shares.append(metrics.get("advantage_clipped", 0.0))
        share = sum(self._shares) / WATCHED_STEPS
        if self._watching and len(self._shares) == WATCHED_STEPS and share > ALERT_SHARE:
            self._watching = False
            clip = self._recipe.advantage_clip
            self._reporter.alert(
                "advantages_clipped",
                f"Over the last {WATCHED_STEPS} steps {share:.0%} of the tokens had an advantage beyond the clip of "
                f"±{clip:g}, so only its sign counts there. The teacher finds most of these rollouts very unlikely: "
                "look at the teacher, its chat template and the SFT; or distill.advantage_clip is too small.",
            )
        return metrics
