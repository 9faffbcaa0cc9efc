"""Scores of one model on prompts: greedy accuracy, avg@n, pass@k, reverse KL, entropy, lengths, repetition.

Reverse KL and entropy are exact over the vocabulary on given sequences.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context, require_going
from opd_mcp.engine.data.batches import build_batch, grouped_rows
from opd_mcp.engine.data.encoding import EncodedPrompt, encode_prompts, student_side
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences, concatenate
from opd_mcp.engine.evaluation.intervals import mean_over_prompts, pass_at_k, per_token_mean, wilson
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import Generator, LocalGenerator
from opd_mcp.engine.generation.served import generator_gap
from opd_mcp.engine.models.attention import hidden_rows, packs
from opd_mcp.engine.models.embeddings import head_logits
from opd_mcp.engine.models.loading import LoadedModel, load_model, load_tokenizer
from opd_mcp.engine.runtime import Runtime, seed_for
from opd_mcp.engine.scoring.local import score_sequences
from opd_mcp.grading.grade import Tally
from opd_mcp.grading.graders import Grader
from opd_mcp.identity.data.rows import PromptRow, Turns
from opd_mcp.identity.models import ModelFacts
from opd_mcp.schemas.recipes import BenchmarkRecipe, Sampling
from opd_mcp.schemas.reports import DomainScore, Estimate95, ModelScore, TokenRatios

PASS_AT = (1, 2, 4, 8, 16, 32, 64)
TILE_BYTES = 256 * 2**20
MICRO_BATCH_TOKENS = 16384
# Between two looks at whether the run shall stop.
GRADED_AT_ONCE = 64
# A response that ends in three or more copies of a phrase of up to eight tokens repeats itself.
REPEATED_TOKENS, LONGEST_PHRASE = 24, 8
SHOWN_PROMPTS = 4
# More are no domains but a name per prompt.
MAX_DOMAINS = 32
SHOWN_TOKENS = 256


@dataclass(frozen=True)
class Measurement:
    """What every model of a benchmark is measured on: the prompts, how, and the teacher of the reverse KL, if any.

    Of several `teachers` by domain each is loaded for the rows of its own; rows of no domain have no reverse KL then.
    """

    settings: BenchmarkRecipe
    rows: Sequence[PromptRow]
    grader: Grader
    teacher: LoadedModel | None
    runtime: Runtime
    context: Context
    teachers: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A model's score, and per prompt [P] its greedy correctness and the share of right samples, for paired numbers.

    `shown` has the first prompts' responses by the prompt's id, `ratios` their tokens against the teacher's.
    """

    score: ModelScore
    greedy_correct: NDArray[np.float64] | None
    sampled_shares: NDArray[np.float64] | None = None
    shown: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, TokenRatios] = field(default_factory=dict)


def score_model(
    name: str,
    model: LoadedModel,
    eos_token_ids: Sequence[int],
    task: Measurement,
    generator: Generator | None = None,
    *,
    as_teacher: bool = False,
) -> Scored:
    """Measure one model; accuracy only on rows with an answer, reverse KL only with a teacher.

    `as_teacher` shows it what the teacher alone sees, as the reverse KL does the teacher. `generator` draws its
    responses, by default the model itself. Raises RunError `engine_disagrees` for an engine that draws from another
    model.
    """
    started, settings = time.perf_counter(), task.settings
    scorer = task.teacher.path if task.teacher else next(iter(task.teachers.values()), None)
    if scorer is None:
        prompts = encode_prompts(*_plain(task, model))
    else:
        tokenizers = load_tokenizer(model.path), load_tokenizer(scorer)
        prompts = encode_prompts(task.rows, tokenizers[0], task.context, tokenizers[1])
    if as_teacher:
        prompts = [prompt.for_teacher() for prompt in prompts]
    draw = _Drawer(name, model, eos_token_ids, task, generator or LocalGenerator(model))
    measured = _Measured()
    answered = [prompt for prompt in prompts if prompt.row.answer is not None]
    greedy = sampled = divergence = entropy = None
    passes: dict[str, float] = {}
    if answered:
        greedy, measured.greedy_correct = draw.greedy_accuracy(answered, measured)
        if settings.samples_per_prompt:
            sampled, passes = draw.sampled_accuracy(answered, measured)
    judged = [prompt for prompt in prompts if not task.teachers or prompt.row.teacher_domain in task.teachers]
    if judged and scorer is not None and model is not task.teacher:
        divergence, entropy = draw.reverse_kl(judged[: settings.kl_prompts], measured)
    if not measured.drawn:
        draw.responses(prompts, settings.sampling, "sampled", measured)
    everything = concatenate(measured.drawn)
    reasons = np.asarray(everything.finish_reasons)
    score = ModelScore(
        name=name,
        identity=model.facts.identity,
        greedy_accuracy=greedy,
        greedy_right=_outcomes(measured.greedy_correct),
        sampled_accuracy=sampled,
        pass_at_k=passes or None,
        reverse_kl=divergence,
        by_domain=_by_domain(answered, measured),
        answers=measured.tally.counts() if answered else None,
        mean_response_tokens=float(everything.response_lengths().mean()),
        truncated_fraction=float((reasons == TRUNCATED).mean()),
        eos_rate=float((reasons == EOS).mean()),
        repeated_fraction=float(np.mean([repeats(everything.response(row)) for row in range(len(everything))])),
        entropy=entropy,
        seconds=time.perf_counter() - started,
        tokens=len(everything.response_ids),
        generated_by=draw.generator.facts,
    )
    # The first responses drawn are one per prompt: the greedy ones where there are answers.
    first = measured.drawn[0].slice(0, min(SHOWN_PROMPTS, len(measured.drawn[0])))
    ids = [prompt.row.id for prompt in (answered or prompts)[: len(first)]]
    shown = dict(zip(ids, draw.texts(first), strict=True))
    ratios = draw.token_ratios(first, task.teacher) if task.teacher and model is not task.teacher else []
    by_id = dict(zip(ids, ratios, strict=False))
    return Scored(score, measured.greedy_correct, measured.sampled_shares, shown, by_id)


def _plain(task: Measurement, model: LoadedModel) -> tuple[list[PromptRow], PreTrainedTokenizerBase, Context]:
    """What `encode_prompts` needs of prompts that only this model sees."""
    rows, context = student_side(task.rows, task.context)
    return rows, load_tokenizer(model.path), context


def asked(row: PromptRow, template: str | None) -> PromptRow:
    """The prompt within the template; of a chat, its last turn that is the user's and a text."""
    if template is None:
        return row
    seen = None if row.teacher_messages is None else _asked_turns(row.teacher_messages, template)
    if row.prompt is not None:
        return replace(row, prompt=template.replace("{prompt}", row.prompt), teacher_messages=seen)
    return replace(row, messages=_asked_turns(row.messages or (), template), teacher_messages=seen)


def _asked_turns(messages: Turns, template: str) -> Turns:
    turns = list(messages)
    for number in reversed(range(len(turns))):
        if turns[number].get("role") == "user" and isinstance(turns[number].get("content"), str):
            turns[number] = {**turns[number], "content": template.replace("{prompt}", turns[number]["content"])}
            break
    return tuple(turns)


def _outcomes(correct: NDArray[np.float64] | None) -> str | None:
    """0/1 outcomes [P] as a report keeps them."""
    return None if correct is None else "".join("1" if right else "0" for right in correct)


@dataclass
class _Measured:
    """Every response drawn for one model, the correctness of the greedy ones [P], and what grading counted."""

    drawn: list[Sequences] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    greedy_correct: NDArray[np.float64] | None = None
    sampled_shares: NDArray[np.float64] | None = None
    divergences: dict[str, Estimate95] = field(default_factory=dict)


def _rows_by_domain(prompts: Sequence[EncodedPrompt]) -> dict[str, NDArray[np.int64]]:
    """The places of the prompts of each `teacher_domain`; none for more domains than a report has room for."""
    named = np.array([prompt.row.teacher_domain for prompt in prompts], dtype=object)
    domains = sorted({name for name in named if name is not None})
    return {} if len(domains) > MAX_DOMAINS else {domain: np.flatnonzero(named == domain) for domain in domains}


def _by_domain(answered: Sequence[EncodedPrompt], measured: _Measured) -> dict[str, DomainScore] | None:
    """Accuracy and reverse KL by the prompts' `teacher_domain`; None where no prompt has one."""
    accuracies, correct = {}, measured.greedy_correct
    if correct is not None:
        for domain, rows in _rows_by_domain(answered).items():
            accuracies[domain] = wilson(int(correct[rows].sum()), len(rows))
    return {
        domain: DomainScore(greedy_accuracy=accuracies.get(domain), reverse_kl=measured.divergences.get(domain))
        for domain in sorted(accuracies.keys() | measured.divergences.keys())
    } or None


@dataclass(frozen=True)
class _Drawer:
    """Draws and judges responses of one model."""

    name: str
    model: LoadedModel
    eos_token_ids: Sequence[int]
    task: Measurement
    generator: Generator

    def responses(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, scope: str, measured: _Measured
    ) -> Sequences:
        """One response per prompt, kept for the length statistics."""
        task = self.task
        require_going(task.context)
        settings = GenerationSettings(
            sampling,
            self.eos_token_ids,
            task.settings.batch_size,
            task.runtime.seed,
            f"benchmark/{scope}",
            self.model.facts.tokens,
        )

        def on_batch(done: int) -> None:
            task.context.reporter.progress(done, len(prompts), f"{scope} responses of {self.name}")

        drawn = self.generator.draw(prompts, settings, on_batch)
        if self.generator.facts is not None and not measured.drawn:
            generator_gap(self.generator, drawn, self.model, task.context)
        measured.drawn.append(drawn)
        return drawn

    def texts(self, drawn: Sequences) -> list[str]:
        """The responses decoded."""
        ids = [drawn.response(row).tolist() for row in range(len(drawn))]
        return list(load_tokenizer(self.model.path).batch_decode(ids, skip_special_tokens=True))

    def token_ratios(self, drawn: Sequences, teacher: LoadedModel) -> list[TokenRatios]:
        """log π_T − log π_θ of each response's first tokens, and where each token ends in the response's text.

        Each model sees its own prompts.
        """
        begun = drawn.beginnings(np.minimum(drawn.response_lengths(), SHOWN_TOKENS))
        scores = [
            score_sequences(
                model, seen, topk=0, micro_batch_tokens=MICRO_BATCH_TOKENS, runtime=self.task.runtime
            ).logprobs.astype(np.float64)
            for model, seen in ((teacher, begun.for_teacher()), (self.model, begun))
        ]
        ratios = begun.with_columns(ratios=scores[0] - scores[1])
        tokenizer = load_tokenizer(self.model.path)

        def text_of(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        return [
            TokenRatios(
                ends=token_ends(begun.response(row).tolist(), text_of),
                log_ratios=[round(float(ratio), 3) for ratio in ratios.column("ratios", row)],
            )
            for row in range(len(begun))
        ]

    def correctness(self, prompts: Sequence[EncodedPrompt], drawn: Sequences, tally: Tally) -> NDArray[np.float64]:
        """1.0 where the response's answer is right [N]."""
        texts = self.texts(drawn)
        golds = [prompt.row.answer or "" for prompt in prompts]
        right = np.zeros(len(texts))
        for row, grade in enumerate(self.task.grader.grades(texts, golds)):
            if row % GRADED_AT_ONCE == 0:
                require_going(self.task.context)
                self.task.context.reporter.progress(row, len(texts), f"responses of {self.name} graded")
            tally.add(texts[row], grade)
            right[row] = grade.correct
        return right

    def greedy_accuracy(
        self, prompts: Sequence[EncodedPrompt], measured: _Measured
    ) -> tuple[Estimate95, NDArray[np.float64]]:
        """Accuracy of the greedy response."""
        sampling = Sampling(temperature=0, max_new_tokens=self.task.settings.sampling.max_new_tokens)
        correct = self.correctness(prompts, self.responses(prompts, sampling, "greedy", measured), measured.tally)
        return wilson(int(correct.sum()), len(correct)), correct

    def sampled_accuracy(
        self, prompts: Sequence[EncodedPrompt], measured: _Measured
    ) -> tuple[Estimate95, dict[str, float]]:
        """avg@n and unbiased pass@k over n samples per prompt."""
        n = self.task.settings.samples_per_prompt
        repeated = [prompt for prompt in prompts for _ in range(n)]
        drawn = self.responses(repeated, self.task.settings.sampling, "sampled", measured)
        correct = self.correctness(repeated, drawn, measured.tally).reshape(len(prompts), n)
        passes = {
            str(k): float(np.mean([pass_at_k(n, int(count), k) for count in correct.sum(axis=1)]))
            for k in PASS_AT
            if k <= n
        }
        measured.sampled_shares = correct.mean(axis=1)
        return mean_over_prompts(measured.sampled_shares, n), passes

    def _divergences(self, drawn: Sequences) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `divergence_sums`, each row with its own teacher; of several one is in memory at a time."""
        task = self.task
        if task.teacher is not None:
            return divergence_sums(self.model, task.teacher, drawn, task.runtime)
        sums = np.zeros((2, len(drawn)))
        for domain, path in task.teachers.items():
            rows = np.flatnonzero(np.array(drawn.domains, dtype=object) == domain)
            if len(rows):
                teacher = load_model(path, task.runtime)
                sums[:, rows] = divergence_sums(self.model, teacher, drawn.take(rows), task.runtime)
                del teacher
        return sums[0], sums[1]

    def reverse_kl(self, prompts: Sequence[EncodedPrompt], measured: _Measured) -> tuple[Estimate95, float]:
        """Exact KL(student‖teacher) and the student's entropy per token, on fresh samples at temperature 1, nats."""
        sampling = Sampling(temperature=1.0, max_new_tokens=self.task.settings.sampling.max_new_tokens)
        drawn = self.responses(prompts, sampling, "reverse-KL", measured)
        divergences, entropies = self._divergences(drawn)
        tokens = drawn.response_lengths().astype(np.float64)

        def estimate(rows: NDArray[np.int64]) -> Estimate95:
            return per_token_mean(
                divergences[rows],
                tokens[rows],
                seed=seed_for(self.task.runtime.seed, "bootstrap") % 2**32,
                basis="exact over the vocabulary, one fresh student sample a prompt at temperature 1",
            )

        for domain, rows in _rows_by_domain(prompts).items():
            measured.divergences[domain] = estimate(rows)
        return estimate(np.arange(len(drawn))), float(entropies.sum() / tokens.sum())


def token_ends(ids: Sequence[int], text_of: Callable[[list[int]], str]) -> list[int]:
    """Where each token [T] ends in the text of all, in characters; one that adds none ends where the one before does.

    Bytes of one character may be spread over several tokens, so each beginning is decoded as a whole.
    """
    whole = text_of(list(ids))
    ends, reached = [], 0
    for count in range(1, len(ids) + 1):
        begun = text_of(list(ids[:count])).rstrip("\ufffd")
        reached = max(reached, min(len(begun), len(whole)))
        ends.append(reached)
    return ends


def repeats(ids: NDArray[np.int32]) -> bool:
    """Whether the ids [T] end in a phrase of up to eight tokens that fills their last 24."""
    if len(ids) < REPEATED_TOKENS:
        return False
    tail = ids[-REPEATED_TOKENS:]
    return any(bool((tail[size:] == tail[:-size]).all()) for size in range(1, LONGEST_PHRASE + 1))


def quantisation_kl(
    quantised: ModelFacts, plain: ModelFacts, eos_token_ids: Sequence[int], task: Measurement
) -> Estimate95:
    """KL(π_q‖π) per token of a model with quantised linear layers and the same one without; one is loaded at a time.

    The estimator is k3, the mean of π/π_q − 1 − log π/π_q on fresh samples of π_q: unbiased, and never negative.
    """
    settings, runtime = task.settings, task.runtime
    model = load_model(quantised, runtime, generates=True)
    prompts = encode_prompts(*_plain(task, model))[: settings.kl_prompts]
    sampling = Sampling(temperature=1.0, max_new_tokens=settings.sampling.max_new_tokens)
    drawer = _Drawer("the quantised student", model, eos_token_ids, task, LocalGenerator(model))
    drawn = drawer.responses(prompts, sampling, "quantisation", _Measured())
    logprobs = []
    for facts in (quantised, plain):
        if facts is plain:
            del model, drawer
            model = load_model(plain, runtime)
        scores = score_sequences(model, drawn, topk=0, micro_batch_tokens=MICRO_BATCH_TOKENS, runtime=runtime)
        logprobs.append(scores.logprobs.astype(np.float64))
    ratio = logprobs[1] - logprobs[0]
    tokens = drawn.response_lengths()
    sums = np.zeros(len(drawn))
    np.add.at(sums, np.repeat(np.arange(len(drawn)), tokens), np.exp(np.minimum(ratio, 20)) - 1 - ratio)
    return per_token_mean(
        sums,
        tokens.astype(np.float64),
        seed=seed_for(runtime.seed, "bootstrap") % 2**32,
        basis="k3 on one fresh sample a prompt of the quantised student at temperature 1",
    )


def reverse_kl_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(π_θ‖π_T) [R] over the ids that both know, each renormalised to them; logits [R, V] and [R, V']."""
    shared = min(student_logits.shape[1], teacher_logits.shape[1])
    student = torch.log_softmax(student_logits[:, :shared].double(), dim=-1)
    teacher = torch.log_softmax(teacher_logits[:, :shared].double(), dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1)


@torch.no_grad()
def divergence_sums(
    student: LoadedModel, teacher: LoadedModel, sequences: Sequences, runtime: Runtime
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σ_t KL(π_θ‖π_T) and Σ_t H(π_θ) of each sequence [N], in nats; each model sees its own prompts."""
    seen = sequences.for_teacher()
    sums = np.zeros((2, len(sequences)), dtype=np.float64)
    tile = max(1, TILE_BYTES // (8 * 4 * max(student.vocab_size, teacher.vocab_size)))
    packed, everything = packs(student.model) and packs(teacher.model), np.arange(len(sequences))
    for group in grouped_rows(sequences.lengths(), everything, MICRO_BATCH_TOKENS, packed=packed):
        batch = build_batch(sequences, group, runtime.device)
        student_hidden = hidden_rows(student.model, batch.input_ids, batch.lengths, batch.rows)
        theirs = batch if seen is sequences else build_batch(seen, group, runtime.device)
        teacher_hidden = hidden_rows(teacher.model, theirs.input_ids, theirs.lengths, theirs.rows)
        totals = torch.zeros((2, len(group)), dtype=torch.float64, device=runtime.device)
        for start in range(0, len(batch.rows), tile):
            rows = slice(start, start + tile)
            logits = head_logits(student.model, student_hidden[rows])
            divergence = reverse_kl_rows(logits, head_logits(teacher.model, teacher_hidden[rows]))
            totals[0].index_add_(0, batch.sequence[rows], divergence)
            totals[1].index_add_(0, batch.sequence[rows], entropy_rows(logits))
        sums[:, group] = totals.cpu().numpy()
    return sums[0], sums[1]


def entropy_rows(logits: Tensor) -> Tensor:
    """H(π) [R] in nats; logits [R, V]."""
    return torch.special.entr(torch.softmax(logits.double(), dim=-1)).sum(dim=-1)
