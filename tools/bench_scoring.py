"""The scoring stage on rollouts of one size and of ten times as many rows: does its memory grow with the rows?"""

from collections.abc import Callable
from pathlib import Path

from opd_mcp.engine import stages
from opd_mcp.engine.context import Context, RolloutInputs, ScoreInputs
from opd_mcp.schemas.recipes import RolloutRecipe, RuntimeRecipe, Sampling, ScoreRecipe

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
CONTEXT = Context(RuntimeRecipe(device="cpu"))


def write_rollouts(scratch: Path, *, rows: int) -> None:
    """Rollouts of `rows` rows, and of ten times as many, in shards of `rows`."""
    for name, count in (("ours", rows), ("ours_10x_rows", 10 * rows)):
        recipe = RolloutRecipe(sampling=Sampling(max_new_tokens=64), count=count, batch_size=rows, shard_rows=rows)
        stages.rollout(
            recipe,
            RolloutInputs(student=EXAMPLE / "student", prompts=EXAMPLE / "opd.jsonl", tokenizer=EXAMPLE / "teacher"),
            scratch / name,
            CONTEXT,
        )


def scoring_run(scratch: Path, variant: str) -> Callable[[], None]:
    """The scoring stage on one of the two, ready to run."""

    def score(name: str, output: str) -> None:
        stages.score(
            ScoreRecipe(topk=8),
            ScoreInputs(
                teacher=EXAMPLE / "teacher",
                student=EXAMPLE / "student",
                rollouts=scratch / name,
                allow_teacher_mismatch=True,
            ),
            scratch / output,
            CONTEXT,
        )

    return lambda: score(variant, f"cache-{variant}")
