"""Tasks of lm-eval on this engine: its requests answered by our generator and scorer (the extra `eval`).

Tokens are encoded as everywhere here: where the tokenizer has a chat template, prompts are chats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import ENOSPC
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from opd_mcp.engine.context import Context, counter, require_going
from opd_mcp.engine.data.encoding import chat_of
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, build_sequences
from opd_mcp.engine.evaluation.intervals import Z95
from opd_mcp.engine.generation.batch_state import Generated, GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.models.loading import AdoptedTokenizer, LoadedModel
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.scoring.local import score_sequences
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import ArgumentError, OpdError, ResourceError, nearest
from opd_mcp.schemas.recipes import BenchmarkRecipe, Sampling
from opd_mcp.schemas.reports import TaskMetric

MICRO_BATCH_TOKENS = 16384
# lm-eval's 100,000 draws take minutes for metrics that are no mean, and change no digit that is shown.
BOOTSTRAP_DRAWS = 1000
METRICS_SHOWN = 100


class EngineModel(TemplateLM):
    """One model as lm-eval asks it; `drawn` and `asked` hold what it was asked and what it wrote."""

    def __init__(
        self,
        model: LoadedModel,
        adopted: AdoptedTokenizer,
        section: BenchmarkRecipe,
        runtime: Runtime,
        context: Context,
    ) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = adopted.tokenizer
        self.templated = adopted.tokenizer.chat_template is not None
        self.drawn: list[Generated] = []
        self.asked: list[Any] = []
        self._model, self._adopted, self._section, self._runtime = model, adopted, section, runtime
        self._context = context
        self._chat = chat_of(adopted.tokenizer, context.prompting, context.rendered_at)
        positions = getattr(model.model.config, "max_position_embeddings", None)
        self._longest = min(positions or 1 << 31, context.prompting.max_prompt_tokens + section.sampling.max_new_tokens)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context: the BOS token, else the end of a turn."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self._adopted.end_of_turn

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's own caches, which are not used here."""
        return str(self._adopted.path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the template writes them; without a generation prompt up to the last turn's own end.

        lm-eval's requests are texts, so a control token that a task spells is encoded as a token.
        """
        text = self._chat.plain(self._chat.rendered(chat_history, to_answer=add_generation_prompt))
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens stand in front unless a template wrote them."""
        special = not self.templated if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts up to the first of each request's stop texts; requests with equal settings share batches."""
        self.asked += [list(request.args) for request in requests]
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for number, (sampling, members) in enumerate(groups.items()):
            require_going(self._context)
            settings = GenerationSettings(
                sampling,
                self._adopted.eos_token_ids,
                self._section.batch_size,
                self._runtime.seed,
                f"lm_eval/{number}",
                self._model.facts.tokens,
            )
            room = max(self._longest - sampling.max_new_tokens, 1)
            prompts = [self.tok_encode(requests[member].args[0])[-room:] for member in members]
            told = counter(self._context, len(members), "responses")
            for member, response in zip(members, generate(self._model.model, prompts, settings, told), strict=True):
                text = str(self.tokenizer.decode(response.response_ids, skip_special_tokens=True))
                texts[member], cut = until(text, requests[member].args[1].get("until"))
                reason = EOS if cut else response.finish_reason
                self.drawn.append(Generated(response.response_ids, [], reason))
        return [texts[number] for number in range(len(requests))]

    def _sampling(self, wanted: Mapping[str, Any]) -> Sampling:
        """A task's own settings; its length within the recipe's limit, which holds where it names none."""
        limit = self._section.sampling.max_new_tokens
        own = wanted.get("max_gen_toks", wanted.get("max_new_tokens", limit))
        sampled = bool(wanted.get("do_sample", wanted.get("temperature", 0) > 0))
        return Sampling(
            temperature=float(wanted.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(wanted.get("top_p", 1.0)) if sampled else 1.0,
            max_new_tokens=min(int(own), limit),
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Σ log π of each continuation, and whether it is what greedy decoding would write."""
        self.asked += [list(texts) for texts, _, _ in requests]
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ log π of each whole text, in windows of the model's length."""
        self.asked += [list(request.args) for request in requests]
        windows, owners = [], []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self._longest, 1)
            for part in parts:
                windows.append(make_disjoint_window(part))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._scored(windows), strict=True):
            sums[owner] += logprob
        return sums

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        require_going(self._context)
        contexts = [context[-max(self._longest - len(continuation), 1) :] for context, continuation in pairs]
        rows = build_sequences(contexts, [continuation for _, continuation in pairs])
        scores = score_sequences(
            self._model,
            rows,
            topk=1,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            runtime=self._runtime,
            valid_vocab=self._model.facts.tokens,
        )
        assert scores.topk_ids is not None, "asked for"
        results = []
        for row in range(len(rows)):
            here = slice(*rows.response_offsets[row : row + 2])
            greedy = bool((scores.topk_ids[here, 0] == rows.response_ids[here]).all())
            results.append((float(scores.logprobs[here].sum(dtype="float64")), greedy))
        self._context.reporter.progress(len(pairs), len(pairs), "continuations scored")
        return results


def until(text: str, stops: str | Sequence[str] | None) -> tuple[str, bool]:
    """The text before the first of the stop texts, and whether one was found."""
    wanted = [stops] if isinstance(stops, str) else list(stops or ())
    places = [place for stop in wanted if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@dataclass(frozen=True)
class TaskRun:
    """What a task gave for one model."""

    metrics: dict[str, TaskMetric]
    documents: int
    drawn: list[Generated]
    asked_sha256: str

    def lengths(self) -> dict[str, float]:
        """The fields of a ModelScore on the texts that were written; none for a task that only scores."""
        texts = len(self.drawn)
        if not texts:
            return {}
        return {
            "mean_response_tokens": sum(len(text.response_ids) for text in self.drawn) / texts,
            "truncated_fraction": sum(text.finish_reason == TRUNCATED for text in self.drawn) / texts,
            "eos_rate": sum(text.finish_reason == EOS for text in self.drawn) / texts,
        }


@dataclass
class Harness:
    """lm-eval with one task, its data kept in `folder`; `tasks` are further task files, which are programs."""

    task: str
    folder: Path
    tasks: Path | None = None
    manager: TaskManager = field(init=False)
    refused: list[str] = field(default_factory=list)
    """Metrics that are programs of the Hub; lm-eval swallows the error that refuses one."""

    def __post_init__(self) -> None:
        """Raises ArgumentError `invalid_argument` for an unknown task."""
        # Nothing outside the run is written, and a metric that is a program of the Hub is not fetched.
        datasets.config.HF_DATASETS_CACHE = self.folder
        datasets.config.DOWNLOADED_DATASETS_PATH = self.folder / "downloads"
        evaluate.load = self._refuse_metric
        self.manager = TaskManager(include_path=self.tasks, include_defaults=self.tasks is None)
        if self.task not in self.manager.all_tasks:
            raise ArgumentError(
                "invalid_argument",
                f"lm-eval {version('lm-eval')} has no task of that name.",
                value=self.task,
                nearest=nearest(self.task, self.manager.all_tasks),
                fix="Name one that `lm-eval ls tasks` lists.",
            )

    def described(self) -> str:
        """What graded the answers."""
        return f"by lm-eval {version('lm-eval')} with the task's own metrics"

    def measure(self, model: EngineModel, section: BenchmarkRecipe, seed: int) -> TaskRun:
        """The task's metrics for a model; raises ResourceError `offline` or `missing_package`, ArgumentError."""
        try:
            loaded = self.manager.load([self.task])
            if self.refused:
                self._refuse_metric(self.refused[0])
            found = simple_evaluate(
                model=model,
                tasks=[loaded["groups"][self.task]] if self.task in loaded["groups"] else [*loaded["tasks"].values()],
                task_manager=self.manager,
                limit=section.limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
                apply_chat_template=model.templated,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OpdError:
            raise
        except ImportError as error:
            raise ResourceError(
                "missing_package",
                f"The task needs a package that is not installed here: {error}.",
                value=self.task,
                fix="Install what the task's page in lm-eval names, e.g. pip install 'lm-eval[ifeval]'.",
            ) from error
        except OSError as error:
            if error.errno == ENOSPC:
                raise
            raise ResourceError(
                "offline",
                f"The task's data could not be fetched from the Hub ({type(error).__name__}).",
                value=self.task,
                fix="Give the machine access to huggingface.co, or give prompts with answers instead of a task.",
            ) from error
        except ValueError as error:
            raise ArgumentError(
                "invalid_argument",
                f"lm-eval cannot run the task: {str(error).splitlines()[0][:300]}",
                value=self.task,
                fix="Choose another task; one that runs programs of the model is refused here.",
            ) from error
        assert found is not None, "a single process has the results"
        counts = {name: int(samples["effective"]) for name, samples in found["n-samples"].items()}
        asked = content_hash([[str(part) for part in request] for request in model.asked])
        return TaskRun(task_metrics(self.task, found["results"], counts), sum(counts.values()), model.drawn, asked)

    def _refuse_metric(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.refused.append(path)
        raise ArgumentError(
            "invalid_argument",
            "The task's metric is a program that lm-eval would fetch from the Hub, and nothing fetched is run here.",
            value=path,
            fix="Choose a task whose metrics are part of lm-eval, e.g. lm_eval:gsm8k.",
        )


def task_metrics(
    task: str, results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]
) -> dict[str, TaskMetric]:
    """lm-eval's metrics with their intervals, the task's own first, then its parts as `part: metric`."""
    metrics: dict[str, TaskMetric] = {}
    for name in sorted(results, key=lambda name: name != task):
        for key, value in results[name].items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results[name].get(f"{metric}_stderr,{filtered}")
            half = Z95 * float(error) if isinstance(error, int | float) else None
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[shown if name == task else f"{name}: {shown}"] = TaskMetric(
                value=float(value),
                low=None if half is None else float(value) - half,
                high=None if half is None else float(value) + half,
                samples=counts.get(name, sum(counts.values())),
            )
    return dict(list(metrics.items())[:METRICS_SHOWN])
