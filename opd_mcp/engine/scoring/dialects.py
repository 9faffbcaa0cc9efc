"""How a teacher's server is asked: requests and answers of vLLM's /v1/completions and SGLang's /generate.

vLLM: `prompt_logprobs=k` answers with one entry per prompt position, null for the first: {token id: {logprob, rank, …}}
with the k best tokens and the position's own, in no order to rely on (vllm/logprobs.py `Logprob`, `PromptLogprobs`).
SGLang: `return_logprob` answers with `meta_info.input_token_logprobs`, a list of [logprob, token id, text], and
`input_top_logprobs`, lists of the same; they begin at `logprob_start_len` with a null, older servers one later without
(sglang/srt/managers/tokenizer_manager.py `detokenize_logprob_tokens`). There the vocabulary's last id is named 0, with
its own log-prob (sglang/srt/managers/scheduler_components/logprob_result_processor.py). `/detokenize` gives the text of
an id, not its token: vLLM answers {tokens: [id]} with {prompt: text} (vllm/entrypoints/serve/tokenize/protocol.py),
SGLang a list of lists with {text: [text, …]} (sglang/srt/entrypoints/openai/serving_tokenize.py). Recorded:
tests/engine/scoring and, of servers that ran here, tests/engine/generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any, Literal

from opd_mcp.engine.scoring.connection import Refusal, Server
from opd_mcp.schemas.errors import ConsistencyError, ResourceError

Dialect = Literal["vllm", "sglang", "opd-mcp"]
PATHS: dict[str, str] = {"vllm": "/v1/completions", "sglang": "/generate", "opd-mcp": "/v1/completions"}
# of our own server only: which tokens its ids mean, so many at a time
TOKENS_PATH, TOKENS_SPAN = "/v1/opd/tokens", 32768
DETOKENIZE_PATH = "/detokenize"
# JSON has no −inf: vLLM writes −9999, SGLang the lowest float32; no log-prob of a softmax comes near either
STANDS_FOR_INFINITY = -9999.0
NO_RANK = 1 << 31


class WireError(ValueError):
    """An answer that is not what was asked for; the text is the reason."""


@dataclass(frozen=True)
class TokenScores:
    """One sequence from `start` on: the tokens' log-probs, and the k best ids and log-probs of each position."""

    logprobs: list[float]
    topk_ids: list[list[int]]
    topk_logprobs: list[list[float]]


def request_body(
    dialect: Dialect, model: str, ids: Sequence[int], start: int, topk: int, temperature: float = 1.0
) -> dict[str, Any]:
    """The JSON that asks for the log-probs of `ids[start:]`; sampling settings are explicit, defaults are servers'."""
    if dialect == "sglang":
        return {
            "input_ids": list(ids),
            "sampling_params": {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "top_logprobs_num": topk,
        }
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": temperature,
        "top_p": 1.0,
        "prompt_logprobs": topk,
    }
    return body | {"opd_start": start} if dialect == "opd-mcp" else body


def read_answer(dialect: Dialect, answer: Any, ids: Sequence[int], start: int, topk: int) -> TokenScores:
    """The scores of `ids[start:]` in an answer; raises WireError for anything that is not exactly that."""
    try:
        read = _read_sglang if dialect == "sglang" else _read_vllm
        scores = read(answer, ids, start, topk)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise WireError("answer has not the expected fields") from error
    best = (value for values in scores.topk_logprobs for value in values)
    if any(not STANDS_FOR_INFINITY < value < inf for value in (*scores.logprobs, *best)):
        raise WireError("log-prob is not finite")
    return scores


def _read_vllm(answer: Any, ids: Sequence[int], start: int, topk: int) -> TokenScores:
    positions = answer["choices"][0]["prompt_logprobs"]
    if not isinstance(positions, list) or len(positions) != len(ids):
        raise WireError("answer has another length than the sequence")
    logprobs: list[float] = []
    topk_ids: list[list[int]] = []
    topk_logprobs: list[list[float]] = []
    for token, entries in zip(ids[start:], positions[start:], strict=True):
        own = (entries or {}).get(str(token))
        if own is None:
            raise WireError("answer scores other tokens than those sent")
        logprobs.append(_number(own["logprob"]))
        if topk:
            pairs = [(int(i), _number(e["logprob"]), e.get("rank") or NO_RANK) for i, e in entries.items()]
            _take_best(sorted(pairs, key=lambda pair: (-pair[1], pair[2])), topk, topk_ids, topk_logprobs)
    return TokenScores(logprobs, topk_ids, topk_logprobs)


def _read_sglang(answer: Any, ids: Sequence[int], start: int, topk: int) -> TokenScores:
    meta, count = answer["meta_info"], len(ids) - start
    entries = meta["input_token_logprobs"]
    if len(entries) < count:
        raise WireError("answer has another length than the sequence")
    entries = entries[len(entries) - count :]
    named, last = [entry[1] for entry in entries], max(ids)
    if named not in (list(ids[start:]), [0 if token == last else token for token in ids[start:]]):
        raise WireError("answer scores other tokens than those sent")
    topk_ids: list[list[int]] = []
    topk_logprobs: list[list[float]] = []
    if topk:
        tops = meta["input_top_logprobs"]
        for best in tops[len(tops) - count :]:
            _take_best([(int(e[1]), _number(e[0]), 0) for e in best], topk, topk_ids, topk_logprobs)
        if len(topk_ids) != count:
            raise WireError("answer has another length than the sequence")
    return TokenScores([_number(entry[0]) for entry in entries], topk_ids, topk_logprobs)


def _number(logprob: Any) -> float:
    """A log-prob; NaN for null, which strict JSON writes for a value that is not finite."""
    return nan if logprob is None else float(logprob)


def _take_best(
    pairs: list[tuple[int, float, int]], topk: int, topk_ids: list[list[int]], topk_logprobs: list[list[float]]
) -> None:
    if len(pairs) < topk:
        raise WireError("answer has fewer top tokens than asked for")
    topk_ids.append([pair[0] for pair in pairs[:topk]])
    topk_logprobs.append([pair[1] for pair in pairs[:topk]])


def require_same_texts(server: Server, dialect: Dialect, model: str, tokenizer: Path, ids: Sequence[int]) -> None:
    """Raise ConsistencyError `tokenizer_mismatch` where most of the ids have another text on the server than here.

    Single texts may differ between two decoders of one vocabulary, and not every server can be asked: then nothing is
    raised, since nothing is known.
    """
    ours = _own_texts(tokenizer, ids)
    try:
        theirs = _served_texts(server, dialect, model, ids)
    except (Refusal, ResourceError, KeyError, TypeError):
        return
    telling = [(id_, here, there) for id_, here, there in zip(ids, ours, theirs, strict=False) if _squeezed(here)]
    differing = [(id_, here, there) for id_, here, there in telling if _squeezed(here) != _squeezed(there)]
    if 2 * len(differing) <= len(telling):
        return
    id_, here, there = differing[0]
    raise ConsistencyError(
        "tokenizer_mismatch",
        f"{len(differing)} of {len(telling)} ids have another text on the teacher's server than here, first id {id_}: "
        f"teacher has {there!a}, student has {here!a}.",
        value=server.url,
        fix="Choose a student with the teacher's tokenizer, e.g. a smaller model of the same family.",
    )


def _own_texts(tokenizer: Path, ids: Sequence[int]) -> list[str]:
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [decoder.decode([id_], skip_special_tokens=False) for id_ in ids]


def _served_texts(server: Server, dialect: Dialect, model: str, ids: Sequence[int]) -> list[str]:
    def asked(tokens: Any, **more: Any) -> Any:
        return server.ask("POST", DETOKENIZE_PATH, {"model": model, "tokens": tokens, **more})

    if dialect == "sglang":
        return [str(text) for text in asked([[id_] for id_ in ids], skip_special_tokens=False)["text"]]
    return [str(asked([id_])["prompt"]) for id_ in ids]


def _squeezed(text: str) -> str:
    """A text without white space, which decoders trim, and without halves of characters, which say nothing."""
    return "".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())
