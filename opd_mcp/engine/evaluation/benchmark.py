"""Scores of one model on prompts: greedy accuracy, avg@n, pass@k, reverse KL, lengths."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import EncodedPrompt, encode_prompts
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences, concatenate
from opd_mcp.engine.evaluation.answers import compiled_pattern, correctness
from opd_mcp.engine.evaluation.divergence import reverse_kl_sums
from opd_mcp.engine.evaluation.intervals import mean_over_prompts, pass_at_k, per_token_mean, wilson
from opd_mcp.engine.generation.rollouts import draw_rollouts
from opd_mcp.engine.models.loading import LoadedModel, load_tokenizer
from opd_mcp.engine.runtime import Runtime, seed_for
from opd_mcp.engine.training.loop import require_going
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.schemas.recipes import BenchmarkRecipe, Sampling
from opd_mcp.schemas.reports import Estimate95, ModelScore

PASS_AT = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class _Measured:
    """Every response drawn for one model, and the correctness of the greedy ones [P]."""

    drawn: list[Sequences] = field(default_factory=list)
    greedy_correct: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Scored:
    """A model's score, and per-prompt greedy correctness [P] for paired comparisons."""

    score: ModelScore
    greedy_correct: NDArray[np.float64] | None


def score_model(
    name: str,
    model: LoadedModel,
    rows: Sequence[PromptRow],
    recipe: BenchmarkRecipe,
    context: Context,
    runtime: Runtime,
    *,
    teacher: LoadedModel | None,
    eos_token_ids: Sequence[int],
) -> Scored:
    """Measure one model on `rows`; accuracy only on rows with an answer, reverse KL only with a teacher."""
    started = time.perf_counter()
    prompts = encode_prompts(rows, load_tokenizer(model.path), context)
    draw = _Drawer(name, model, recipe, context, runtime, eos_token_ids)
    measured = _Measured()
    answered = [prompt for prompt in prompts if prompt.row.answer is not None]
    greedy = sampled = divergence = None
    passes: dict[str, float] = {}
    if answered:
        greedy, measured.greedy_correct = draw.greedy_accuracy(answered, measured)
        if recipe.samples_per_prompt:
            sampled, passes = draw.sampled_accuracy(answered, measured)
    if teacher is not None:
        divergence = draw.reverse_kl(prompts[: recipe.kl_prompts], teacher, measured)
    if not measured.drawn:
        draw.responses(prompts, recipe.sampling, "sampled", measured)
    everything = concatenate(measured.drawn)
    reasons = np.asarray(everything.finish_reasons)
    score = ModelScore(
        name=name,
        identity=model.facts.identity,
        greedy_accuracy=greedy,
        sampled_accuracy=sampled,
        pass_at_k=passes or None,
        reverse_kl=divergence,
        mean_response_tokens=float(everything.response_lengths().mean()),
        truncated_fraction=float((reasons == TRUNCATED).mean()),
        eos_rate=float((reasons == EOS).mean()),
        seconds=time.perf_counter() - started,
        tokens=len(everything.response_ids),
    )
    return Scored(score, measured.greedy_correct)


@dataclass(frozen=True)
class _Drawer:
    """Draws and judges responses of one model."""

    name: str
    model: LoadedModel
    recipe: BenchmarkRecipe
    context: Context
    runtime: Runtime
    eos_token_ids: Sequence[int]

    def responses(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, scope: str, measured: _Measured
    ) -> Sequences:
        """One response a prompt, kept for the length statistics."""
        require_going(self.context)
        drawn = draw_rollouts(
            self.model,
            prompts,
            sampling,
            eos_token_ids=self.eos_token_ids,
            batch_size=self.recipe.batch_size,
            seed=self.runtime.seed,
            scope=f"benchmark/{scope}",
            valid_vocab=self.model.facts.tokens,
            on_batch=lambda done: self.context.reporter.progress(
                done, len(prompts), f"{scope} responses of {self.name}"
            ),
        )
        measured.drawn.append(drawn)
        return drawn

    def correctness(self, prompts: Sequence[EncodedPrompt], drawn: Sequences) -> NDArray[np.float64]:
        """1.0 where the response's answer is right [N]."""
        tokenizer = load_tokenizer(self.model.path)
        pattern = compiled_pattern(self.recipe.answer_pattern)
        texts = tokenizer.batch_decode(
            [drawn.response(row).tolist() for row in range(len(drawn))], skip_special_tokens=True
        )
        return np.array(correctness(texts, [prompt.row.answer or "" for prompt in prompts], pattern), dtype=np.float64)

    def greedy_accuracy(
        self, prompts: Sequence[EncodedPrompt], measured: _Measured
    ) -> tuple[Estimate95, NDArray[np.float64]]:
        """Accuracy of the greedy response."""
        sampling = Sampling(temperature=0, max_new_tokens=self.recipe.sampling.max_new_tokens)
        correct = self.correctness(prompts, self.responses(prompts, sampling, "greedy", measured))
        return wilson(int(correct.sum()), len(correct)), correct

    def sampled_accuracy(
        self, prompts: Sequence[EncodedPrompt], measured: _Measured
    ) -> tuple[Estimate95, dict[str, float]]:
        """avg@n and unbiased pass@k over n samples a prompt."""
        n = self.recipe.samples_per_prompt
        repeated = [prompt for prompt in prompts for _ in range(n)]
        drawn = self.responses(repeated, self.recipe.sampling, "sampled", measured)
        correct = self.correctness(repeated, drawn).reshape(len(prompts), n)
        passes = {
            str(k): float(np.mean([pass_at_k(n, int(count), k) for count in correct.sum(axis=1)]))
            for k in PASS_AT
            if k <= n
        }
        return mean_over_prompts(correct.mean(axis=1), n), passes

    def reverse_kl(self, prompts: Sequence[EncodedPrompt], teacher: LoadedModel, measured: _Measured) -> Estimate95:
        """Exact KL(student‖teacher) per token on fresh samples at temperature 1."""
        sampling = Sampling(temperature=1.0, max_new_tokens=self.recipe.sampling.max_new_tokens)
        drawn = self.responses(prompts, sampling, "reverse-KL", measured)
        return per_token_mean(
            reverse_kl_sums(self.model, teacher, drawn, self.runtime),
            drawn.response_lengths().astype(np.float64),
            seed=seed_for(self.runtime.seed, "bootstrap") % 2**32,
            basis="exact over the vocabulary, one fresh student sample a prompt at temperature 1",
        )
