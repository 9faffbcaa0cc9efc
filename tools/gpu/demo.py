"""The embedded arithmetic task in memory, without Parquet: the last check of `check.py`."""

import itertools
import tomllib

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.batches import stored_batches
from opd_mcp.engine.data.encoding import encode_prompts
from opd_mcp.engine.evaluation.model_score import Measurement, score_model
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import LocalGenerator
from opd_mcp.engine.losses.objectives import SFT_OBJECTIVE, distill_objective
from opd_mcp.engine.models.loading import LoadedModel, adopt_tokenizer, load_model
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import score_sequences
from opd_mcp.engine.training.loop import LoopSettings, TrainingTask, train
from opd_mcp.engine.training.step import distill_metrics, sft_metrics
from opd_mcp.grading.golds import recipe_grader
from opd_mcp.grading.graders import grader_for
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.schemas.recipes import Recipe
from tools import EXAMPLE, ROOT


def distilled_accuracies(runtime: Runtime, *, share: float = 1.0) -> dict[str, float]:
    """Greedy accuracy of the SFT and of the distilled student with the demo preset; `share` shortens both trainings."""
    preset = tomllib.loads((ROOT / "opd_mcp/schemas/presets/demo.toml").read_text(encoding="utf-8"))
    recipe = Recipe.model_validate({"preset": "demo", **preset})
    context = Context(recipe.runtime, recipe.prompting)
    adopted = adopt_tokenizer(EXAMPLE / "teacher", recipe.prompting)
    teacher = load_model(EXAMPLE / "teacher", runtime)
    student = load_model(EXAMPLE / "student", runtime, for_training=True)

    def draw(policy: LoadedModel, name: str, count: int, section: object, scope: str) -> object:
        prompts = encode_prompts(read_prompts(EXAMPLE / name), adopted.tokenizer, context)
        settings = GenerationSettings(
            section.sampling, adopted.eos_token_ids, section.batch_size, runtime.seed, scope, policy.facts.tokens
        )
        return LocalGenerator(policy).draw(list(itertools.islice(itertools.cycle(prompts), count)), settings)

    def fit(section: object, data: object, objective: object, measure: object, normalize: str) -> None:
        steps = max(1, int(section.steps * share))
        settings = LoopSettings(steps, section.optimizer, normalize, section.micro_batch_tokens)
        rows = stored_batches(data, steps=steps, batch_size=section.batch_size, seed=runtime.seed, scope=normalize)
        train(student.model, TrainingTask(settings, rows, objective, measure), runtime, context)

    def accuracy(name: str) -> float:
        settings = recipe.benchmark.model_copy(update={"samples_per_prompt": 0})
        rows = read_prompts(EXAMPLE / "tune.jsonl")  # eval.jsonl is for final results, not for a check that runs often
        grader_name, _ = recipe_grader(settings, [row.answer for row in rows if row.answer is not None])
        with grader_for(grader_name, pattern=settings.answer_pattern) as grader:
            task = Measurement(settings, rows, grader, None, runtime, context)
            scored = score_model(name, student, adopted.eos_token_ids, task)
        return scored.score.greedy_accuracy.value

    responses = draw(teacher, "sft.jsonl", recipe.responses.limit or 350, recipe.responses, "responses")
    fit(recipe.sft, responses, SFT_OBJECTIVE, sft_metrics, "token")
    found = {"sft": accuracy("sft")}
    count = max(64, int((recipe.rollout.count or 3200) * share))
    rollouts = draw(student, "opd.jsonl", count, recipe.rollout, "rollout")
    scores = score_sequences(
        teacher, rollouts, topk=recipe.score.topk, micro_batch_tokens=recipe.score.micro_batch_tokens, runtime=runtime
    )
    fit(
        recipe.distill,
        rollouts.with_columns(**scores.columns()),
        distill_objective(recipe.distill),
        lambda result: distill_metrics(result, recipe.distill),
        recipe.distill.normalize,
    )
    found["distilled"] = accuracy("distilled")
    print("demo greedy accuracy", found, flush=True)
    return found
