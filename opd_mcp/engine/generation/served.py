"""A model whose files are here and that answers prompts on a server: vLLM, SGLang, or our own `serve-teacher`.

One request a row, every sampling setting explicit (a server's defaults are the model's `generation_config`), a 63-bit
seed of its own from (seed, scope, row), so that a row does not depend on what is drawn with it. The log-probs asked for
are untruncated and at temperature 1. vLLM: /v1/completions with `return_token_ids` and `logprobs: 0`, server in
`raw_logprobs` mode (vllm/entrypoints/openai/protocol.py). SGLang: /generate with `output_token_logprobs`, started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1 (sglang/srt/layers/sampler.py); it ignores stop ids together with EOS, so its EOS must
be one of them. Seeds have 31 bits there, which older versions take too, and mean nothing on a CPU. Answers of both that
were recorded here: tests/engine/generation.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np

from opd_mcp.engine.context import Context, EngineAddress, EngineWish
from opd_mcp.engine.data.encoding import EncodedPrompt
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences
from opd_mcp.engine.generation.batch_state import Generated, GenerationSettings
from opd_mcp.engine.generation.generator import Generator, LocalGenerator, SharedGenerator, as_sequences
from opd_mcp.engine.models.loading import LoadedModel
from opd_mcp.engine.runtime import open_runtime, seed_for
from opd_mcp.engine.scoring.connection import Access, Patience, Refusal
from opd_mcp.engine.scoring.dialects import PATHS, Dialect, WireError
from opd_mcp.engine.scoring.lines import one_of_several
from opd_mcp.engine.scoring.local import GAP_ROWS, ROUNDING, engine_gap
from opd_mcp.engine.scoring.remote import (
    BYTES_PER_ENTRY,
    PROBE_TOKENS,
    WRONG_ANSWERS,
    RemoteScorer,
    open_remote,
    probe_ids,
    side_by_side,
)
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.cache import COARSEST_DTYPE, ENGINE_GAP_BOUNDS, EngineGap
from opd_mcp.schemas.errors import ConsistencyError, DataError, PathError, ResourceError, RunError
from opd_mcp.schemas.identity import EngineFacts, RemoteTeacher
from opd_mcp.schemas.recipes import Sampling, is_url, urls_of

# A response is one answer, which comes when its last token is drawn.
GENERATING = Patience(timeout_s=1800.0, total_s=1800.0)
MOST_REQUESTS = 128
ONE_BY_ONE = 2  # requests at a time to our own server, which draws one response at a time
BYTES_PER_TOKEN = 400
ANSWERS_BYTES = 1 << 29  # of scores that are read at the same time
PROBE_TEMPERATURE = 0.5
# Nats: mean distance of the probe's two scores. Rounding in bf16 is far below it, log-probs after temperature above.
PROBE_DISTANCE = 0.05


@dataclass(frozen=True)
class Ask:
    """One row to draw: its prompt, how, the ids that end it, and its seed."""

    ids: Sequence[int]
    sampling: Sampling
    stop_ids: Sequence[int]
    seed: int


def draw_body(dialect: Dialect, model: str, ask: Ask) -> dict[str, Any]:
    """The JSON that asks for one response."""
    plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": -1, "min_p": 0.0}
    drawn: dict[str, Any] = {"temperature": ask.sampling.temperature, "top_p": ask.sampling.top_p, **plain}
    if dialect == "sglang":
        drawn |= {"max_new_tokens": ask.sampling.max_new_tokens, "sampling_seed": ask.seed % (1 << 31)}
        drawn |= {"stop_token_ids": list(ask.stop_ids), "no_stop_trim": True, "skip_special_tokens": False}
        drawn["ignore_eos"] = not ask.stop_ids
        return {
            "input_ids": list(ask.ids),
            "sampling_params": drawn,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
        }
    return {
        "model": model,
        "prompt": list(ask.ids),
        "max_tokens": ask.sampling.max_new_tokens,
        **drawn,
        "seed": ask.seed,
        "stop_token_ids": list(ask.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def read_drawn(dialect: Dialect, answer: Any, ask: Ask) -> Generated:
    """The response in an answer; raises WireError for anything that is not exactly what was asked for."""
    try:
        read = _read_sglang if dialect == "sglang" else _read_vllm
        ids, logprobs, stopped = read(answer, ask)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise error if isinstance(error, WireError) else WireError("answer has not the expected fields") from error
    if not 0 < len(ids) <= ask.sampling.max_new_tokens or len(ids) != len(logprobs):
        raise WireError("answer has another length than asked for")
    if any(not isfinite(value) or value > ROUNDING for value in logprobs):
        raise WireError("log-prob is not finite or above 0")
    ends = [token in ask.stop_ids for token in ids]
    if any(ends[:-1]):
        raise WireError("answer goes on behind a stop id")
    if stopped and not ends[-1]:
        raise WireError("answer stops without a stop id")
    if not ends[-1] and len(ids) < ask.sampling.max_new_tokens:
        raise WireError("answer ends before its limit without a stop id")
    return Generated(ids, logprobs, EOS if ends[-1] else TRUNCATED)


def _read_vllm(answer: Any, ask: Ask) -> tuple[list[int], list[float], bool]:
    choice = answer["choices"][0]
    echoed = choice["prompt_token_ids"] if choice.get("prompt_token_ids") is not None else answer["prompt_token_ids"]
    if echoed != list(ask.ids):
        raise WireError("answer is to another prompt than the one sent")
    ids = [int(token) for token in choice["token_ids"]]
    logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    if choice["finish_reason"] not in ("stop", "length"):
        raise WireError("answer was ended by the server")
    return ids, logprobs, choice["finish_reason"] == "stop"


def _read_sglang(answer: Any, ask: Ask) -> tuple[list[int], list[float], bool]:
    meta = answer["meta_info"]
    if meta["prompt_tokens"] != len(ask.ids):
        raise WireError("answer is to another prompt than the one sent")
    entries = meta["output_token_logprobs"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise WireError("answer was ended by the server")
    return [int(entry[1]) for entry in entries], [float(entry[0]) for entry in entries], reason == "stop"


@dataclass(frozen=True)
class ServedGenerator:
    """A model on a server that has shown that it is the model here, and that its log-probs are raw."""

    scorer: RemoteScorer
    facts: EngineFacts

    def draw(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerationSettings,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> Sequences:
        """As the protocol; the server shows who it is before the first row and after the last.

        Raises DataError `too_long` before any row where one does not fit the server's context, RunError `bad_rows` for
        an answer that stays wrong, ConsistencyError `engine_untrue`.
        """
        scorer = self.scorer
        require_room(room_for(prompts, settings.sampling), scorer.max_length, scorer.server.url)
        scorer.prove()
        pool = ThreadPoolExecutor(len(scorer.connections))
        longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].ids))
        drawn: dict[int, Generated] = {}
        futures = {pool.submit(self._row, prompts[row].ids, settings, row): row for row in longest_first}
        try:
            for future in as_completed(futures):
                drawn[futures[future]] = future.result()
                on_batch(len(drawn))
        except BaseException:
            scorer.lines.stop()  # the others would only wait for the same servers
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        scorer.prove()
        return as_sequences(prompts, [drawn[row] for row in range(len(prompts))])

    def each(self) -> "list[ServedGenerator]":
        """Every server alone."""
        return [ServedGenerator(scorer, self.facts) for scorer in self.scorer.each()]

    def _row(self, ids: Sequence[int], settings: GenerationSettings, row: int) -> Generated:
        """One response; a tail of the vocabulary that means nothing is never drawn, so such a row is drawn again."""
        why = ""
        for attempt in range(WRONG_ANSWERS):
            scope = (settings.scope, row, attempt) if attempt else (settings.scope, row)
            ask = Ask(ids, settings.sampling, settings.eos_token_ids, seed_for(settings.seed, *scope))
            response = self._asked(ask)
            if settings.valid_vocab is None or max(response.response_ids) < settings.valid_vocab:
                return response
            why = "it drew ids that mean nothing"
        raise self._bad_row(why)

    def _asked(self, ask: Ask) -> Generated:
        limit, why = (1 << 20) + (len(ask.ids) + ask.sampling.max_new_tokens) * BYTES_PER_TOKEN, ""
        dialect = self.scorer.dialect
        body = draw_body(dialect, self.scorer.model, ask)
        for _ in range(WRONG_ANSWERS):
            try:
                return self.scorer.lines.served(
                    lambda line: read_drawn(
                        dialect, line.server.ask("POST", PATHS[dialect], body, max_bytes=limit), ask
                    )
                )
            except WireError as error:
                why = str(error)
            except Refusal as refusal:
                raise self._bad_row(f"the server refused it ({refusal})") from refusal
        raise self._bad_row(why)

    def _bad_row(self, why: str) -> RunError:
        return RunError(
            "bad_rows",
            f"The engine cannot answer a prompt: {why}.",
            value=self.scorer.server.url,
            fix="Remove the cause and resume the run (finished shards are kept), or use the engine 'local'.",
        )


def require_room(needed: int, room: int | None, who: str) -> None:
    """Raise DataError `too_long` where the longest row has more tokens than a server, or a model, takes."""
    if room is not None and needed > room:
        raise DataError(
            "too_long",
            f"The longest prompt with its response has up to {needed} tokens; {who} takes {room} in all.",
            value=who,
            fix="Start the server with a longer context (vLLM: --max-model-len), or lower 'sampling.max_new_tokens' or "
            "'prompting.max_prompt_tokens'.",
        )


@contextmanager
def engine_addresses(wish: EngineWish, context: Context) -> Iterator[list[EngineAddress]]:
    """Where the engine answers: at its URLs, or as long as the block where it is started for it.

    Raises PathError `unsupported_adapter` for an adapter: what engines load is a whole model.
    """
    if inspect_model(wish.model).adapter is not None:
        raise PathError(
            "unsupported_adapter",
            "An engine serves whole models, and this directory holds an adapter.",
            value=wish.model,
            fix="Save the student merged ('sft.adapter.save': 'merged'), or use the engine 'local'.",
        )
    if is_url(wish.kind):
        yield [EngineAddress(url, context.teacher_key) for url in urls_of(wish.kind)]
        return
    with context.start_engine(wish) as addresses:
        yield addresses


@contextmanager
def opened_engine(
    wish: EngineWish, requests: int, context: Context, patience: Patience | None = None
) -> Iterator[tuple[RemoteScorer, EngineFacts]]:
    """The model of a directory on an engine, for the block's time, and what a record says of the engine.

    `requests` are those to a server at a time. Of several servers those that do not answer are left out, with the alert
    `engine_lost`; one must. Raises what `open_remote` and `side_by_side` raise.
    """
    with engine_addresses(wish, context) as addresses, ExitStack() as stack:
        several, opened, lost = len(addresses) > 1, list[RemoteScorer](), list[ResourceError]()
        for address in addresses:
            access = engine_access(address, context, patience)
            try:
                scorer = open_remote(
                    RemoteTeacher(name=address.name or wish.model.name, url=address.url),
                    wish.model,
                    files=wish.model,
                    concurrency=requests,
                    topk=wish.topk,
                    access=replace(access, patience=one_of_several(access.patience)) if several else access,
                )
            except ResourceError as error:
                if not several or error.code != "engine_unreachable":
                    raise
                context.reporter.alert("engine_lost", f"{address.url} is left out. {error.message}")
                lost.append(error)
                continue
            stack.callback(scorer.close)
            opened.append(scorer)
        if not opened:
            raise lost[-1]
        engine = side_by_side(opened, partial(context.reporter.alert, "engine_lost"))
        stack.callback(engine.close)
        yield engine, engine_facts(engine, addresses[0])


def engine_access(address: EngineAddress, context: Context, patience: Patience | None = None) -> Access:
    """How an engine is asked."""
    should_stop, check = context.reporter.should_stop, address.check
    access = Access(address.key, should_stop=should_stop, role="engine", check=check)
    return replace(access, patience=patience) if patience else access


@contextmanager
def opened_generator(
    wish: EngineWish | None, model: LoadedModel, requests: int, context: Context
) -> Iterator[Generator]:
    """What answers prompts for the block's time: the engine of a wish for the model, or without one the model itself,
    here and in helpers.

    `requests` are how many rows are in work at a time. Raises what
    `open_remote` raises for an engine, and ConsistencyError `engine_untrue` where its log-probs of drawn tokens are not
    raw, and PathError `unsupported_model` for a model in 4 bits, whose stored weights are another model.
    """
    if wish is None:
        yield LocalGenerator(model) if context.helpers is None else SharedGenerator(model, context)
        return
    if model.facts.identity.quantization is not None:
        raise PathError(
            "unsupported_model",
            "An engine would serve this model as it is stored, and what is asked for are its dequantised weights.",
            value=model.path,
            fix="Use the engine 'local', or leave out 'distill.adapter.quantization'.",
        )
    with opened_engine(wish, min(requests, MOST_REQUESTS), context, GENERATING) as (scorer, facts):
        generator = ServedGenerator(with_fewer(scorer, ONE_BY_ONE) if scorer.dialect == "opd-mcp" else scorer, facts)
        for one in generator.each():
            require_raw(one)
        yield generator


def engine_wish(engine: str | None, model: LoadedModel, length: int, context: Context) -> EngineWish | None:
    """The engine that is to serve a model's directory for rows of so many tokens at most; None for the model itself."""
    return None if engine is None else EngineWish(engine, model.path, context.runtime.dtype, length)


def with_fewer(scorer: RemoteScorer, requests: int) -> RemoteScorer:
    """The scorer with so many requests at a time to each of its servers."""
    parts = tuple(with_fewer(part, requests) for part in scorer.parts)
    return replace(scorer, connections=scorer.connections[: requests * max(len(parts), 1)], parts=parts)


@contextmanager
def opened_scorer(wish: EngineWish, concurrency: int, context: Context) -> Iterator[tuple[RemoteScorer, EngineFacts]]:
    """As `opened_engine`, to score rows that are there: with as many at a time as their answers' memory allows.

    vLLM and SGLang batch by themselves what waits for them; our own server takes `concurrency` requests at a time.
    """
    row_bytes = max(wish.length, 1) * (wish.topk + 2) * BYTES_PER_ENTRY
    requests = max(concurrency, min(MOST_REQUESTS, ANSWERS_BYTES // row_bytes))
    with opened_engine(wish, requests, context) as (scorer, facts):
        yield with_fewer(scorer, concurrency) if scorer.dialect == "opd-mcp" else scorer, facts


def engine_facts(scorer: RemoteScorer, address: EngineAddress) -> EngineFacts:
    """What a record says of an engine."""
    known = {"dtype": address.dtype or scorer.facts.dtype, "managed": address.managed}
    return scorer.facts.model_copy(update=known)


def require_raw(generator: ServedGenerator) -> None:
    """Raise ConsistencyError `engine_untrue` where drawn tokens have other log-probs than the same tokens given.

    vLLM's `processed_logprobs` leaves those of given tokens raw, so only a response shows it.
    """
    scorer = generator.scorer
    size = min(PROBE_TOKENS, max(1, ((scorer.max_length or 2 * PROBE_TOKENS + 1) - 1) // 2))
    prompt = probe_ids(scorer.tokens)[:size]
    sampling = Sampling(temperature=PROBE_TEMPERATURE, max_new_tokens=size)
    drawn = generator._asked(Ask(prompt, sampling, (), seed_for(0, "generation probe")))
    scores = scorer.row_scores(scorer.connections[0], [*prompt, *drawn.response_ids], len(prompt), 0)
    if isinstance(scores, str):
        raise generator._bad_row(scores)
    distance = float(np.abs(np.array(scores.logprobs) - np.array(drawn.logprobs)).mean())
    if not distance <= PROBE_DISTANCE:
        raise ConsistencyError(
            "engine_untrue",
            f"The server's log-probs of the tokens that it draws are {distance:.2g} nats from those of the same tokens "
            "given: they are taken after temperature and top-p, not the model's own.",
            value=scorer.server.url,
            fix="Serve raw log-probs (vLLM: --logprobs-mode raw_logprobs; SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1).",
        )


def first_gap(
    generator: Generator,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    local: LoadedModel,
    context: Context,
) -> EngineGap | None:
    """How far a generator's log-probs of its first rows are from the model's here, before hours of work.

    Of several servers each draws them; the largest distance counts. Raises RunError `engine_disagrees`: an engine
    serves another model, or does not compute this one.
    """
    every = generator.each() if isinstance(generator, ServedGenerator) else [generator]
    gaps = [generator_gap(one, one.draw(prompts[:GAP_ROWS], settings), local, context) for one in every]
    return max((gap for gap in gaps if gap is not None), key=lambda gap: gap.mean, default=None)


def generator_gap(generator: Generator, drawn: Sequences, local: LoadedModel, context: Context) -> EngineGap | None:
    """How far the log-probs of the first rows drawn are from those of the model here.

    Raises RunError `engine_disagrees`. The alert `engine_rounds` is for a distance as of bf16.
    """
    facts = generator.facts
    narrow = facts is not None and facts.dtype != "float32"
    gap = engine_gap(local, drawn, open_runtime(context.runtime), COARSEST_DTYPE if narrow else None)
    if gap is not None and narrow and gap.mean > ENGINE_GAP_BOUNDS["float32"]:
        context.reporter.alert(
            "engine_rounds",
            f"The engine's log-probs are {gap.mean:.2g} nats on average from those of the model here, as in bf16. "
            "'rollout.rescore' = 'local' stores the trainer's own instead.",
        )
    return gap


def require_fits(generator: Generator, needed: int) -> None:
    """Raise DataError `too_long` where an engine's context has no room for the longest of all rows."""
    if isinstance(generator, ServedGenerator):
        require_room(needed, generator.scorer.max_length, generator.scorer.server.url)


def room_for(prompts: Sequence[EncodedPrompt], sampling: Sampling) -> int:
    """The tokens of the longest row that can be drawn."""
    return max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
