"""Watches on a distillation's metrics: each alerts once, when what the last steps trained on has lost its meaning."""

from collections import deque
from dataclasses import dataclass, field

from opd_mcp.engine.context import Context
from opd_mcp.engine.training.loop import Metrics
from opd_mcp.engine.training.objectives import distill_metrics
from opd_mcp.engine.training.step import StepResult
from opd_mcp.schemas.recipes import DistillRecipe

WATCHED_STEPS = 10
# A clip that binds on most tokens has replaced the teacher's judgement by its sign.
CLIPPED_SHARE = 0.5
# For log-normal weights the share is e^−σ²: at 0.1 the student's log-probs are spread by σ = 1.5 nats a token around
# those that the rollouts were drawn with. A few tokens are heavy enough to pull single steps far lower (to 0.001), so
# the mean of ten steps is judged. In `opd-mcp demo`, seeds 0 and 1, its lowest values were 0.19 and 0.26 (sampled) and
# 0.46 and 0.49 (top-k) with the SFT's own teacher, and 0.02 and 0.04 with another one, whose student forgot the task.
EFFECTIVE_SHARE = 0.1


@dataclass
class Watch:
    """The mean of a metric over the last steps: `is_bad` once it is beyond the limit, above or below."""

    metric: str
    healthy: float
    limit: float
    above: bool
    told: bool = False
    values: deque[float] = field(default_factory=lambda: deque(maxlen=WATCHED_STEPS))

    def is_bad(self, metrics: Metrics) -> bool:
        """Whether this step is the one to tell it; a step that does not have the metric counts as healthy."""
        self.values.append(metrics.get(self.metric, self.healthy))
        if self.told or len(self.values) < WATCHED_STEPS:
            return False
        self.told = self.mean > self.limit if self.above else self.mean < self.limit
        return self.told

    @property
    def mean(self) -> float:
        """Over the last steps."""
        return sum(self.values) / len(self.values)


class DistillWatch:
    """The metrics of a distillation step; alerts once for a clip that binds and once for rollouts that are stale."""

    def __init__(self, recipe: DistillRecipe, context: Context) -> None:
        self._recipe, self._reporter = recipe, context.reporter
        # the forward KL has no advantage, so its clip means nothing
        pointless = recipe.estimator == "topk_forward_kl"
        self._clip = Watch("advantage_clipped", 0.0, CLIPPED_SHARE, above=True, told=pointless)
        self._drift = Watch("effective_sample_share", 1.0, EFFECTIVE_SHARE, above=False)

    def __call__(self, result: StepResult) -> Metrics:
        """`distill_metrics` of the step."""
        metrics = distill_metrics(result, self._recipe)
        if self._clip.is_bad(metrics):
            self._reporter.alert(
                "advantages_clipped",
                f"Over the last {WATCHED_STEPS} steps {self._clip.mean:.0%} of the tokens had an advantage beyond the "
                f"clip of ±{self._recipe.advantage_clip:g}, so only its sign counts there. The teacher finds most of "
                "these rollouts very unlikely: look at the teacher, its chat template and the SFT; or "
                "distill.advantage_clip is too small.",
            )
        if self._drift.is_bad(metrics):
            self._reporter.alert(
                "rollouts_stale",
                f"Over the last {WATCHED_STEPS} steps effective_sample_share was {self._drift.mean:.3f}: the student "
                "is so far from the policy that drew the rollouts that they say little about what it writes now. Take "
                "fewer distill.steps or a lower learning rate, or build a teacher cache of new rollouts from the "
                "distilled student and go on from it.",
            )
        return metrics
