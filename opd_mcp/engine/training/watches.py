"""What watches a training: no step that is not finite moves the weights, and a distillation's metrics raise alerts.

A few bad steps are skipped, then training ends with its last good weights. `DistillWatch` alerts once for each of its
metrics, when what the last steps trained on has lost its meaning.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.training.step import Metrics, StepResult, distill_metrics, domain_metrics
from opd_mcp.identity.files import write_atomic
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.recipes import DistillRecipe
from opd_mcp.schemas.reports import LoopState, TrainingSummary

MAX_SKIPPED = 3
MAX_SAVED_ROWS = 256
WATCHED_STEPS = 10
# A clip that binds on most tokens has replaced the teacher's judgement by its sign.
CLIPPED_SHARE = 0.5
# For log-normal weights the share is e^−σ²: at 0.1 the student's log-probs are spread by σ = 1.5 nats a token around
# those that the rollouts were drawn with. A few tokens are heavy enough to pull single steps far lower (to 0.001), so
# the mean of ten steps is judged. In `opd-mcp demo`, seeds 0 and 1, its lowest values were 0.19 and 0.26 (sampled) and
# 0.46 and 0.49 (top-k) with the SFT's own teacher, and 0.02 and 0.04 with another one, whose student forgot the task.
EFFECTIVE_SHARE = 0.1
UNDERTRAINED_SHARE = 0.5


@dataclass
class FiniteGuard:
    """Counts bad steps in a row; their rows are saved next to the checkpoints."""

    context: Context
    skipped: int = 0

    def is_good(self, step: int, metrics: dict[str, float], rows: Sequences) -> bool:
        """Whether the step may move the weights.

        Raises RunError `bad_number`, naming the values and the file of the rows, after three skipped steps in a row.
        """
        bad = {name: value for name, value in metrics.items() if not np.isfinite(value)}
        if not bad:
            self.skipped = 0
            return True
        saved = self._saved(step, rows)
        if self.skipped < MAX_SKIPPED:
            self.skipped += 1
            self.context.reporter.alert(
                "step_skipped",
                f"Step {step + 1} gave {_named(bad)}; it is skipped and the weights stay as they are{saved}.",
            )
            return False
        raise RunError(
            "bad_number",
            f"Steps {step - MAX_SKIPPED + 1} to {step + 1} gave numbers that are not finite; none of them changed the "
            f"weights, and the last good ones are in the newest checkpoint{saved}.",
            value=_named(bad),
            fix="Start again with a lower learning rate ('sft.optimizer.learning_rate' or "
            "'distill.optimizer.learning_rate'), or look at the rows of these steps.",
        )

    def last_good(self, state: LoopState) -> LoopState:
        """The state before the bad steps: weights and optimizer have not moved since."""
        return state.model_copy(update={"step": state.step - self.skipped})

    def _saved(self, step: int, rows: Sequences) -> str:
        """Where the step's rows are, as the end of a sentence; nothing where there is no place for them."""
        if self.context.checkpoints is None or not self.context.writes:
            return ""
        self.context.checkpoints.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self.context.checkpoints / f"bad-step-{step + 1:08d}.jsonl"
        lines = [json.dumps(_row(rows, row)) + "\n" for row in range(min(len(rows), MAX_SAVED_ROWS))]
        write_atomic(file, "".join(lines))
        return f"; its rows: {file}"


def _row(rows: Sequences, row: int) -> dict[str, object]:
    columns = {name: rows.column(name, row).astype(float) for name in rows.columns}
    return {
        "prompt_ids": rows.prompt(row).tolist(),
        "response_ids": rows.response(row).tolist(),
        "finite": bool(all(np.isfinite(values).all() for values in columns.values())),
        **{
            name: [value if np.isfinite(value) else str(value) for value in values.ravel().tolist()]
            for name, values in columns.items()
        },
    }


def _named(bad: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in bad.items())


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


def are_stale(recent: Sequence[Metrics]) -> bool:
    """Whether a distillation's last `WATCHED_STEPS` steps say that the rollouts are another policy's by now."""
    shares = [metrics.get("effective_sample_share", 1.0) for metrics in recent[-WATCHED_STEPS:]]
    return len(shares) == WATCHED_STEPS and sum(shares) / WATCHED_STEPS < EFFECTIVE_SHARE


class DistillWatch:
    """The metrics of a distillation step; alerts once for a clip that binds and once for rollouts that are stale.

    `next_round` is the number of the round that begins when they are; `domains` are told one by one.
    """

    def __init__(
        self, settings: DistillRecipe, context: Context, next_round: int | None = None, domains: Sequence[str] = ()
    ) -> None:
        self._settings, self._reporter, self._next_round = settings, context.reporter, next_round
        self._domains = domains
        # these have no advantage that a clip could bind on
        pointless = settings.estimator in ("topk_forward_kl", "topk_js", "opsa")
        self._clip = Watch("advantage_clipped", 0.0, CLIPPED_SHARE, above=True, told=pointless)
        self._drift = Watch("effective_sample_share", 1.0, EFFECTIVE_SHARE, above=False)

    def __call__(self, result: StepResult) -> Metrics:
        """`distill_metrics` of the step, and `domain_metrics` where rows have domains."""
        metrics = distill_metrics(result, self._settings) | domain_metrics(result, self._domains)
        if self._clip.is_bad(metrics):
            self._reporter.alert(
                "advantages_clipped",
                f"Over the last {WATCHED_STEPS} steps {self._clip.mean:.0%} of the tokens had an advantage beyond the "
                f"clip of ±{self._settings.advantage_clip:g}, so only its sign counts there. The teacher finds most of "
                "these rollouts very unlikely: look at the teacher, its chat template and the SFT; or "
                "distill.advantage_clip is too small.",
            )
        if self._drift.is_bad(metrics):
            self._tell_stale(self._drift.mean)
        return metrics

    def _tell_stale(self, share: float) -> None:
        seen = f"Over the last {WATCHED_STEPS} steps effective_sample_share was {share:.3f}"
        if self._next_round is not None:
            self._reporter.alert(
                "next_round", f"{seen}: round {self._next_round} begins, on new rollouts of the student as it is now."
            )
            return
        self._reporter.alert(
            "rollouts_stale",
            f"{seen}: the student is so far from the policy that drew the rollouts that they say little about what it "
            "writes now. Take fewer distill.steps or a lower learning rate, build a teacher cache of new rollouts from "
            "the distilled student and continue from it, or let a run do that: raise 'distill.rounds', with "
            "'distill.round_trigger' 'stale' where it is to begin a round by itself.",
        )


def tell_undertrained(summary: TrainingSummary, vocabulary: int, context: Context) -> None:
    """The alert `sft_undertrained` where the SFT student is still nearer to guessing than to the teacher's responses.

    That is a mean log-prob of the responses, over the last tenth of the steps, below half of a guess's, log 1/V.
    """
    reached, guess = summary.final.get("mean_logprob"), -math.log(vocabulary)
    if summary.steps < WATCHED_STEPS or reached is None or reached > UNDERTRAINED_SHARE * guess:
        return
    context.reporter.alert(
        "sft_undertrained",
        f"After {summary.steps} steps of SFT the teacher's responses have a mean log-prob of {reached:.2f} nats per "
        f"token; a guess among {vocabulary} tokens has {guess:.2f}. Such a student's rollouts teach little. Raise "
        "'sft.steps' four times, or begin with a pretrained student.",
    )
