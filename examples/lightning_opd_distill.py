"""Distill a student with Lightning OPD in one command: SFT → rollouts → teacher scores → distillation → report.

    python examples/lightning_opd_distill.py --student_model_path DIR --teacher_model DIR \\
        --teacher_responses_dataset FILE --unlabeled_prompts_dataset FILE --output_model_path NEW_DIR

Each step is one call of `opd_mcp.engine.stages`; nothing else is needed to use the engine as a library. Runs of hours
are better started through the server: there a finished stage is kept and reused, here a stopped run leaves nothing.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from opd_mcp.engine.context import BenchmarkInputs, DistillInputs, RolloutInputs, ScoreInputs, SftInputs
from opd_mcp.schemas.errors import ArgumentError, OpdError

if TYPE_CHECKING:
    from distill_inputs import Inputs

    from opd_mcp.schemas.recipes import Recipe
    from opd_mcp.schemas.reports import TrainingSummary

DESCRIPTION = """\
Distill a student with Lightning OPD (offline on-policy distillation, arXiv 2604.13010):
  1 SFT on the teacher's responses      2 one rollout of that SFT student for each prompt
  3 the teacher's log-probs of them     4 distillation from the stored log-probs     5 report

What --epochs means, exactly. SFT takes ceil(E · R / B) steps, with R the responses that fit 4096 tokens and
B = min(32, R). Distillation takes ceil(E · N / B) steps, with N the rollouts (one for each training prompt) and
B = min(64, N). Batches are cut from shuffled epochs laid end to end, so each row is used E times, and the last batch
is filled up from one more shuffle.

Prompts with an `answer`: every tenth of those that are not among the teacher's responses (at most 500) is held out of
the training, and the report gives the accuracy on them. Without answers the report is the reverse KL to the teacher.

Responses that carry no lineage are taken to be --teacher_model's, and the result records that as asserted; so it does
for a lineage that your workspace (OPD_HOME) did not sign. Responses of another teacher are refused. All other settings
are those of the preset "quick", except: warm-up a tenth of the SFT steps, new tokens at most twice the longest teacher
response (and 4096), bf16 on CUDA.
"""
DATA_HELP = "JSONL or Parquet file, a directory with one, or a Hub data set's id (its split `train`)"
MODEL_HELP = "a directory with safetensors, or a Hub id (fetched into the workspace, OPD_HOME)"
PAIR_HELP = "one value for both stages, or two with a comma: SFT's, then distillation's"
MOST_NEW_TOKENS = 4096
SHOWN_METRICS = {"loss": "loss", "mean_logprob": "log-prob", "advantage_abs": "|advantage|"}


def parsed_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `epochs` and `learning_rate` become pairs (SFT, distillation)."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student_model_path", required=True, help=f"the base student: {MODEL_HELP}")
    parser.add_argument("--teacher_model", required=True, help=f"the teacher whose responses these are: {MODEL_HELP}")
    parser.add_argument(
        "--teacher_responses_dataset", required=True, help=f"`prompt` (or `messages`) and `response`: {DATA_HELP}"
    )
    parser.add_argument(
        "--unlabeled_prompts_dataset", required=True, help=f"`prompt` (or `messages`), optional `answer`: {DATA_HELP}"
    )
    parser.add_argument("--output_model_path", required=True, type=Path, help="a new directory; it appears when done")
    parser.add_argument("--epochs", type=pair_of(int), default="1", help=f"E above; {PAIR_HELP}, e.g. 3,2 (default 1)")
    parser.add_argument(
        "--learning_rate", type=pair_of(float), default="8e-5,2e-6", help=f"{PAIR_HELP} (default 8e-5,2e-6: the paper)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(argv)


def pair_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """A parser of `A` or `A,B` with positive values; one value counts for both stages."""

    def pair(text: str) -> tuple[Any, Any]:
        values = [kind(part) for part in text.split(",")]
        if len(values) > 2 or not all(0 < value < math.inf for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is not one or two positive numbers")
        return values[0], values[-1]

    return pair


class ProgressReporter:
    """The engine's reporter, drawn: one bar a stage with its latest figures; alerts are printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()
        self._bar = TaskID(0)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Draw a bar for the stage inside; where there is no terminal, its title is printed."""
        if not self._console.is_terminal:
            self.say(title)
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as self._progress:
            self._bar = self._progress.add_task(title, total=1, unit="", note="")
            yield

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """Not shown: the unit that is counted says it."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """The bar moves."""
        self._update(completed=done, total=total, unit=unit)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """The figures next to the bar."""
        self._update(note=", ".join(f"{label} {values[n]:.3f}" for n, label in SHOWN_METRICS.items() if n in values))

    def alert(self, code: str, message: str) -> None:
        """A line above the bar."""
        self.say(f"! {message}")

    def should_stop(self) -> bool:
        """Never: Ctrl-C stops a command line."""
        return False

    def _update(self, **fields: Any) -> None:
        self._progress.update(self._bar, **fields)


def distill(arguments: argparse.Namespace, console: Console) -> None:
    """Run all stages in a hidden directory next to the output, and give the finished model its name at the end."""
    output = arguments.output_model_path.expanduser().absolute()
    if output.exists():
        raise ArgumentError(
            "invalid_argument", "The output directory exists.", value=output, fix="Give --output_model_path a new name."
        )
    # Only now: torch takes seconds to load.
    from distill_inputs import checked_inputs, own_lineages

    from opd_mcp.engine import stages
    from opd_mcp.engine.context import Context
    from opd_mcp.identity.files import publish_directory, write_atomic
    from opd_mcp.worker.stage_calls import training_cost

    reporter = ProgressReporter(console)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        work = Path(folder)
        made_here = own_lineages(work)
        inputs = checked_inputs(arguments, work, made_here)
        recipe = resolved_recipe(arguments, inputs)
        reporter.say(beginning(inputs, recipe))
        context = Context(recipe.runtime, recipe.prompting, reporter, made_here=made_here)
        # Directories named as the models are: an identity in the lineage has its directory's name.
        sft_student, student = work / "sft" / f"{inputs.student.name}-sft", work / "distilled" / output.name

        with reporter.stage("1/5 SFT"):
            sft_summary = stages.sft(
                recipe.sft,
                SftInputs(
                    student=inputs.student,
                    responses=inputs.responses,
                    sft_teacher=inputs.claim,
                    tokenizer=inputs.tokenizer,
                ),
                sft_student,
                context,
            )
        reporter.say(trained(sft_summary))
        with reporter.stage("2/5 rollouts"):
            drawn = stages.rollout(
                recipe.rollout,
                RolloutInputs(student=sft_student, prompts=inputs.prompts, tokenizer=inputs.teacher),
                work / "rollouts",
                context,
            )
        with reporter.stage("3/5 teacher scores"):
            scored = stages.score(
                recipe.score,
                ScoreInputs(teacher=inputs.teacher, student=sft_student, rollouts=work / "rollouts"),
                work / "cache",
                context,
            )
        reporter.say(f"  {drawn.tokens} tokens drawn in {drawn.seconds:.1f} s and scored in {scored.seconds:.1f} s")
        with reporter.stage("4/5 distillation"):
            summary = stages.distill(
                recipe.distill, DistillInputs(student=sft_student, cache=work / "cache"), student, context
            )
        reporter.say(trained(summary))
        with reporter.stage("5/5 report"):
            stages.benchmark(
                recipe.benchmark,
                BenchmarkInputs(
                    models={"distilled": student, "sft": sft_student},
                    teacher=inputs.teacher,
                    prompts=inputs.eval_prompts,
                    recipe_hash=recipe.content_hash(),
                    costs=[training_cost("sft", sft_summary), drawn, scored, training_cost("distill", summary)],
                ),
                student / "report",
                context,
            )
        write_atomic(student / "report" / "recipe.json", recipe.to_json(indent=2) + "\n")
        publish_directory(student, output)
    reporter.say("\n" + (output / "report" / "report.md").read_text(encoding="utf-8"))
    reporter.say(f"The distilled student is in {output}, its lineage in lineage.json, the report in report/.")


def resolved_recipe(arguments: argparse.Namespace, inputs: "Inputs") -> "Recipe":
    """The preset `quick` with what the command line and the data say; the step counts are those of --help."""
    import torch

    from opd_mcp.schemas.resolve import preset_values, resolve_recipe

    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    preset = preset_values("quick")
    sft_batch = min(preset["sft"]["batch_size"], inputs.sft_rows)
    distill_batch = min(preset["distill"]["batch_size"], inputs.prompt_rows)
    sft_steps = math.ceil(arguments.epochs[0] * inputs.sft_rows / sft_batch)
    new_tokens = min(2 * inputs.longest_response, MOST_NEW_TOKENS)
    return resolve_recipe(
        "quick",
        {
            "runtime.device": arguments.device,
            "runtime.dtype": "bfloat16" if cuda else "float32",
            "sft.steps": sft_steps,
            "sft.batch_size": sft_batch,
            "sft.optimizer.learning_rate": arguments.learning_rate[0],
            "sft.optimizer.schedule": "cosine",
            "sft.optimizer.warmup_steps": sft_steps // 10,
            "rollout.sampling.max_new_tokens": new_tokens,
            "distill.steps": math.ceil(arguments.epochs[1] * inputs.prompt_rows / distill_batch),
            "distill.batch_size": distill_batch,
            "distill.optimizer.learning_rate": arguments.learning_rate[1],
            "benchmark.answer_pattern": inputs.answer_pattern,
            "benchmark.sampling.max_new_tokens": new_tokens,
            "benchmark.limit": inputs.held_out or preset["benchmark"]["kl_prompts"],
        },
    )


def beginning(inputs: "Inputs", recipe: "Recipe") -> str:
    """What is about to be done, in three lines."""
    known = {"proven": "proven by their lineage", "asserted": "asserted: no lineage of your workspace says so"}
    evaluation = f"{inputs.held_out} held out for the report, answers found by {recipe.benchmark.answer_pattern!r}"
    return (
        f"{inputs.sft_rows} responses of {inputs.claim.label()} ({known[inputs.claim.basis]})\n"
        f"{inputs.prompt_rows} training prompts; {evaluation if inputs.held_out else 'no answers held out'}\n"
        f"{recipe.sft.steps} SFT steps of {recipe.sft.batch_size} at {recipe.sft.optimizer.learning_rate:g}, "
        f"{recipe.distill.steps} distillation steps of {recipe.distill.batch_size} at "
        f"{recipe.distill.optimizer.learning_rate:g}, at most {recipe.rollout.sampling.max_new_tokens} new tokens"
    )


def trained(summary: "TrainingSummary") -> str:
    """What a training stage did, in a line."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in summary.final.items() if name in SHOWN_METRICS)
    return f"  {summary.steps} steps of {summary.seconds_per_step:.3f} s; over the last tenth: {figures}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the student is there; 1, after one line on stderr, when it could not be made."""
    arguments = parsed_arguments(argv)
    try:
        distill(arguments, Console())
    except OpdError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing was kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
