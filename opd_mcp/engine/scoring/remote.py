"""A model at a URL: vLLM, SGLang, or our own `opd-mcp serve-teacher`, proven by a probe before any row is sent.

Mostly a teacher that scores; with the access of an `engine` also a model whose files are here and that only computes
there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.provenance import full_identity
from opd_mcp.engine.scoring.connection import Access, Refusal, Server
from opd_mcp.engine.scoring.dialects import (
    PATHS,
    TOKENS_PATH,
    TOKENS_SPAN,
    Dialect,
    TokenScores,
    WireError,
    read_answer,
    request_body,
    require_same_texts,
)
from opd_mcp.engine.scoring.lines import Line, Lines
from opd_mcp.engine.scoring.local import ScoredRows, TeacherScores
from opd_mcp.identity.models import text_hash
from opd_mcp.identity.tokenizers import (
    eos_token_ids,
    map_difference,
    mismatch_error,
    special_token_names,
    special_tokens_hash,
    token_map,
    token_map_hash,
)
from opd_mcp.schemas.errors import ConsistencyError, ResourceError, RunError
from opd_mcp.schemas.identity import EngineFacts, ModelIdentity, RemoteTeacher
from opd_mcp.schemas.next_action import resume_call
from opd_mcp.schemas.recipes import SGLANG_KEEPS
from opd_mcp.schemas.texts import escaped

PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.05  # nats; far above rounding in bf16, far below another model or temperature
WRONG_ANSWERS = 3
BYTES_PER_ENTRY = 160
MOST_TOKENS = 1 << 22  # no vocabulary is larger; a server's claim is not trusted


@dataclass(frozen=True)
class RemoteScorer:
    """A proven remote teacher; `model` is its name on the server, ids at or above `tokens` mean nothing.

    Each of the `connections` serves one request at a time. `facts` say what an engine is. `parts` are the servers that
    serve it side by side, each alone; empty for one.
    """

    server: Server
    dialect: Dialect
    model: str
    tokens: int
    max_length: int | None
    connections: Sequence[Line]
    identity: ModelIdentity
    vocab_size: int
    facts: EngineFacts
    parts: "Sequence[RemoteScorer]" = ()
    told: Callable[[str], None] = lambda text: None

    @cached_property
    def lines(self) -> Lines:
        """Who answers next."""
        return Lines(self.connections, self._prove, self.told)

    def each(self) -> "Sequence[RemoteScorer]":
        """Every server alone."""
        return self.parts or (self,)

    def score(self, sequences: Sequences, topk: int) -> ScoredRows:
        """Scores of every row, one request at a time per line; rows that the server cannot score are refused.

        The teacher is asked who it is before the first row, after the last one, and on each connection that is new.
        Raises ConsistencyError `teacher_untrue` when it is another: then none of these rows counts.
        """
        self.prove()
        result = self._scored(sequences, topk)
        self.prove()
        return result

    def prove(self) -> None:
        """Raise ConsistencyError `teacher_untrue` unless the server gives the same identity and probe as before."""
        self.lines.prove_all()

    def _scored(self, sequences: Sequences, topk: int) -> ScoredRows:
        total = len(sequences.response_ids)
        logprobs = np.zeros(total, dtype=np.float32)
        topk_ids = np.zeros((total, topk), dtype=np.int32) if topk else None
        topk_logprobs = np.zeros((total, topk), dtype=np.float32) if topk else None
        refused: dict[int, str] = {}

        def one(row: int) -> None:
            prompt, response = sequences.prompt(row).tolist(), sequences.response(row).tolist()
            if not response:
                return
            answer = self.lines.served(lambda line: self.row_scores(line, prompt + response, len(prompt), topk))
            if isinstance(answer, str):
                refused[row] = answer
                return
            here = slice(*sequences.response_offsets[row : row + 2])
            logprobs[here] = answer.logprobs
            if topk_ids is not None and topk_logprobs is not None:
                topk_ids[here], topk_logprobs[here] = answer.topk_ids, answer.topk_logprobs

        with ThreadPoolExecutor(len(self.connections)) as pool:
            futures = [pool.submit(one, row) for row in range(len(sequences))]
            done, pending = wait(futures, return_when=FIRST_EXCEPTION)
            if pending:  # one failed for good: the others would only wait for the same server
                self.lines.stop()
                for future in pending:
                    future.cancel()
            errors = [error for future in done if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return ScoredRows(TeacherScores(logprobs, topk_ids, topk_logprobs), refused)

    def _prove(self, line: Line) -> None:
        """Ask over this line, and note over which connection the answer came."""
        served = _served_identity(line.server, _served_model(line.server, self.model))
        if served is None and self.dialect == "opd-mcp":
            raise _replaced(self, "it no longer says who it is")
        if served is not None and served.differences(self.identity) & {"weights", "configuration", "tokenizer"}:
            raise _replaced(self, f"it now serves {served.label()}")
        answer = self.row_scores(line, probe_ids(self.tokens), 1, 0)
        if isinstance(answer, str):
            raise _replaced(self, f"it can no longer score the probe sequence: {answer}")
        if not same_probe(answer.logprobs, self.identity.probe):
            raise _replaced(self, "it gives other log-probs of the probe sequence than before")
        line.proven = line.server.opened

    def row_scores(
        self, line: Line, ids: Sequence[int], start: int, topk: int, temperature: float = 1.0
    ) -> TokenScores | str:
        """The scores of `ids[start:]`, or the reason why the server cannot give them."""
        if self.max_length is not None and len(ids) + 1 > self.max_length:
            return "longer than the server's context"
        body = request_body(self.dialect, self.model, ids, start, topk, temperature)
        reason = ""
        for _ in range(WRONG_ANSWERS):
            try:
                limit = (1 << 20) + len(ids) * (topk + 2) * BYTES_PER_ENTRY
                answer = line.server.ask("POST", PATHS[self.dialect], body, max_bytes=limit)
                scores = read_answer(self.dialect, answer, ids, start, topk)
            except WireError as error:
                reason = str(error)
                continue
            except Refusal as refusal:
                if refusal.status in (401, 403, 404):
                    raise _refused(line.server, refusal) from refusal
                return f"server refused: {refusal}"
            if any(token >= self.tokens for best in scores.topk_ids for token in best):
                return "top token outside the vocabulary"
            return scores
        return reason

    def close(self) -> None:
        """Close the connections."""
        self.lines.close()


def open_remote(
    remote: RemoteTeacher,
    tokenizer: Path,
    *,
    files: Path | None = None,
    concurrency: int = 8,
    topk: int = 0,
    access: Access | None = None,
) -> RemoteScorer:
    """The teacher at a URL, once it has shown who it is.

    `tokenizer` is a directory with the tokens that ids mean here; `files` the teacher's own directory where it is also
    here. Raises ResourceError `teacher_unreachable` or `teacher_refused`, ConsistencyError `tokenizer_mismatch`, or
    `teacher_untrue` for a server that is not the declared model or scales log-probs by a temperature; for an engine
    `engine_unreachable`, `engine_refused` and `engine_untrue`.
    """
    server = Server(remote.url, access)
    try:
        entry = _served_model(server, remote.name)
        dialect: Dialect = {"sglang": "sglang", "opd-mcp": "opd-mcp"}.get(str(entry.get("owned_by")), "vllm")  # type: ignore[assignment]
        tokens = token_map(tokenizer)
        identity = _identity(server, remote, entry, tokens, tokenizer, files)
        if dialect != "opd-mcp":
            require_same_texts(server, dialect, str(entry["id"]), tokenizer, probe_ids(max(tokens) + 1))
        length = _longest(dialect, entry)
        teacher = RemoteScorer(
            server=server,
            dialect=dialect,
            model=str(entry["id"]),
            tokens=max(tokens) + 1,
            max_length=length,
            connections=[Line(server), *(Line(server.another()) for _ in range(concurrency - 1))],
            identity=identity,
            vocab_size=int(entry.get("opd_vocab_size") or max(tokens) + 1),
            facts=_engine_facts(server, dialect, entry),
        )
        probe = _probed(teacher, topk)
        server.known.set()
    except BaseException:
        server.close()
        raise
    return replace(teacher, identity=identity.model_copy(update={"probe": probe}))


def side_by_side(scorers: Sequence[RemoteScorer], told: Callable[[str], None]) -> RemoteScorer:
    """Several servers as one: each serves what it can, and one that is lost gives its rows back.

    Raises ConsistencyError `engine_untrue` unless they are one engine in one version with the same log-probs.
    """
    first = scorers[0]
    for other in scorers[1:]:
        mine, theirs = first.facts, other.facts
        differing = "another engine" if mine != theirs else "other log-probs of the probe sequence"
        if mine == theirs and first.dialect == other.dialect and same_probe(first.identity.probe, other.identity.probe):
            continue
        raise ConsistencyError(
            f"{first.server.access.role}_untrue",
            f"The servers {first.server.url} ({mine.label()}) and {other.server.url} ({theirs.label()}) are not alike: "
            f"{differing}.",
            value=other.server.url,
            fix="Serve the same model by the same version of one engine at every address.",
        )
    lengths = [scorer.max_length for scorer in scorers if scorer.max_length is not None]
    groups = zip_longest(*(scorer.connections for scorer in scorers))
    return replace(
        first,
        max_length=min(lengths, default=None),
        connections=[line for group in groups for line in group if line is not None],
        parts=tuple(scorers) if len(scorers) > 1 else (),
        told=told,
    )


def remote_rescorer(
    remote: RemoteTeacher, tokenizer: Path, key: str | None, expected: ModelIdentity | None = None
) -> Callable[[Sequences, int], NDArray[np.float32]]:
    """What `cache verify` asks for: from rows and k to the log-probs that a server gives them.

    It raises as `open_remote` and `RemoteScorer.score`, ConsistencyError `teacher_untrue` for a server with another
    probe than the `expected` teacher's, and RunError `bad_rows` for a row that the server cannot score.
    """

    def rescored(rows: Sequences, topk: int) -> NDArray[np.float32]:
        teacher = open_remote(remote, tokenizer, access=Access(key, resumes=False))
        try:
            if expected is not None and expected.probe and not same_probe(expected.probe, teacher.identity.probe):
                raise _untrue(
                    teacher.server,
                    remote.name,
                    "it gives other log-probs of the probe sequence than the cache's teacher gave",
                )
            result = teacher.score(rows, 0)
        finally:
            teacher.close()
        if result.refused:
            row, reason = next(iter(result.refused.items()))
            raise RunError(
                "bad_rows",
                f"The server cannot score a row of this cache: {reason}.",
                value=rows.prompt_row_ids[row],
                fix="See that the server serves the cache's teacher, with room for its longest row.",
            )
        return result.scores.logprobs

    return rescored


def probe_ids(tokens: int) -> list[int]:
    """The fixed sequence that a remote teacher is asked about: spread over the vocabulary, its last id included."""
    return [(index * 7919 + 11) % tokens for index in range(PROBE_TOKENS - 1)] + [tokens - 1]


def same_probe(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    """Whether two probes can be of one model: equal but for rounding."""
    if first is None or second is None:
        return first is second
    return len(first) == len(second) and all(abs(a - b) <= PROBE_TOLERANCE for a, b in zip(first, second, strict=True))


def _served_model(server: Server, name: str) -> dict[str, Any]:
    try:
        listed = server.ask("GET", "/v1/models")
    except Refusal as refusal:
        raise _refused(server, refusal) from refusal
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = [entry for entry in (data if isinstance(data, list) else []) if isinstance(entry, dict) and "id" in entry]
    short = name.rstrip("/").rsplit("/", 1)[-1].casefold()
    for entry in entries:
        if str(entry["id"]) == name or str(entry["id"]).rstrip("/").rsplit("/", 1)[-1].casefold() == short:
            return entry
    role = server.access.role
    if role == "engine" and len(entries) == 1:  # a file's name proves nothing anyway; rows scored here will
        return entries[0]
    raise ConsistencyError(
        f"{role}_untrue",
        f"The server at {'teacher_url' if role == 'teacher' else 'the engine'} does not serve {name}.",
        value=name,
        nearest=[str(entry["id"]) for entry in entries][:3],
        fix=f"Give as {role} a model that the server lists under /v1/models."
        if role == "teacher"
        else f"Serve the model under the name {name}.",
    )


def _longest(dialect: Dialect, entry: dict[str, Any]) -> int | None:
    """How long a sequence may be with the tokens asked for, where the server tells its context."""
    context = entry.get("max_model_len")
    if type(context) is not int:
        return None
    return context - SGLANG_KEEPS if dialect == "sglang" else context


def _engine_facts(server: Server, dialect: Dialect, entry: dict[str, Any]) -> EngineFacts:
    """The engine with its version, where the server tells it."""
    if dialect == "opd-mcp":
        return EngineFacts(name=dialect, version=_text(entry.get("opd_version")), dtype=_text(entry.get("opd_dtype")))
    told = None
    if server.access.role == "engine":
        for path in ("/version",) if dialect == "vllm" else ("/server_info", "/get_server_info"):
            with suppress(Refusal):
                told = server.ask("GET", path)
                break
    return EngineFacts(name=dialect, version=_text(told.get("version")) if isinstance(told, dict) else None)


def _text(value: Any) -> str | None:
    return escaped(value[:64]) if isinstance(value, str) else None


def _identity(
    server: Server,
    remote: RemoteTeacher,
    entry: dict[str, Any],
    tokens: dict[int, str],
    tokenizer: Path,
    files: Path | None,
) -> ModelIdentity:
    served = _served_identity(server, entry)
    if served is not None and served.tokenizer != token_map_hash(tokens):
        difference = map_difference(_served_tokens(server, remote), tokens)
        if difference is None:
            raise _untrue(server, remote.name, "its tokens are not those of the hash that it gives")
        raise mismatch_error(difference, remote.url)
    if files is not None:
        local = full_identity(files)
        if served is not None and not served.same_model(local):
            raise _untrue(server, remote.name, f"it serves {served.label()}, the files here are {local.label()}")
        return local.model_copy(update={"remote": "served"})
    if served is not None:
        return served.model_copy(update={"remote": "served"})
    return ModelIdentity(
        name=remote.name,
        weights=text_hash(f"named:{remote.name}"),
        tokenizer=token_map_hash(tokens),
        special_tokens=special_tokens_hash(eos_token_ids(tokenizer, tokens), special_token_names(tokenizer)),
        remote="named",
    )


def _served_identity(server: Server, entry: dict[str, Any]) -> ModelIdentity | None:
    """What `serve-teacher` says of itself; None for other servers."""
    given = entry.get("opd_identity")
    if not isinstance(given, dict):
        return None
    try:
        return ModelIdentity.model_validate(given)
    except ValidationError as error:
        raise ConsistencyError(
            f"{server.access.role}_untrue",
            "The server gives an identity that cannot be read.",
            value=server.url,
            fix="Serve the model with the version of opd-mcp that is used here.",
        ) from error


def _served_tokens(server: Server, remote: RemoteTeacher) -> dict[int, str]:
    """The id → token map that `serve-teacher` gives, in pieces that stay small for any vocabulary."""
    tokens: dict[int, str] = {}
    start, total = 0, 1
    try:
        while start < min(total, MOST_TOKENS):
            answer = server.ask("GET", f"{TOKENS_PATH}?start={start}&count={TOKENS_SPAN}")
            tokens |= {id_: str(token) for id_, token in enumerate(answer["tokens"], start) if token is not None}
            start, total = start + TOKENS_SPAN, int(answer["total"])
    except Refusal as refusal:
        raise _refused(server, refusal) from refusal
    except (KeyError, TypeError, ValueError) as error:
        raise _untrue(server, remote.name, "it does not say what its ids mean") from error
    return tokens


def _probed(teacher: RemoteScorer, topk: int) -> list[float]:
    ids, code = probe_ids(teacher.tokens), f"{teacher.server.access.role}_untrue"
    answers = [teacher.row_scores(teacher.connections[0], ids, 1, topk, temperature) for temperature in (1.0, 0.5)]
    for answer in answers:
        if isinstance(answer, str):
            raise ConsistencyError(
                code,
                f"The server cannot score the probe sequence, which ends with the vocabulary's last id: {answer}.",
                value=teacher.server.url,
                fix="See that the server allows prompt log-probs of so many top tokens (vLLM: --max-logprobs), and "
                "that the student has the teacher's tokenizer.",
            )
    plain, other = (answer.logprobs for answer in answers if not isinstance(answer, str))
    if not same_probe(plain, other):
        raise ConsistencyError(
            code,
            "The server scales prompt log-probs by the sampling temperature, so they are not the model's own.",
            value=teacher.server.url,
            fix="Serve raw log-probs (vLLM: --logprobs-mode raw_logprobs; SGLang: its default).",
        )
    if any(value > 1e-4 for value in plain):
        raise ConsistencyError(
            code,
            "The server's log-probs are above 0.",
            value=max(plain),
            fix="See what is served there; these are no log-probs.",
        )
    return plain


def _untrue(server: Server, name: str, why: str) -> ConsistencyError:
    role = server.access.role
    return ConsistencyError(
        f"{role}_untrue",
        f"The server is not the {role} {name}: {why}.",
        value=server.url,
        fix="Give the URL of the declared teacher, or the teacher that is served there."
        if role == "teacher"
        else "Serve the model whose files are here.",
    )


def _replaced(teacher: RemoteScorer, why: str) -> ConsistencyError:
    role, resumes = teacher.server.access.role, teacher.server.access.resumes
    return ConsistencyError(
        f"{role}_untrue",
        f"The server is not the {role} {teacher.model} any more that it was when this began: {why}.",
        value=teacher.server.url,
        fix=f"Serve the same {role} again at this address, then "
        + ("resume the run: the shards that were finished before are kept." if resumes else "verify again."),
        call=resume_call() if resumes else None,
    )


def _refused(server: Server, refusal: Refusal) -> ResourceError:
    role = server.access.role
    hint = "Set OPD_TEACHER_KEY to the server's key where opd-mcp is started." if refusal.status in (401, 403) else ""
    return ResourceError(
        f"{role}_refused",
        f"The {role}'s server refused the request ({refusal}).",
        value=server.url,
        fix=hint
        or f"Give {'teacher_url' if role == 'teacher' else 'the engine'} as the server's base address, e.g. "
        "http://host:8000.",
    )
