"""Proving a teacher cache: bytes against their hashes, values against what they may be, a sample against a teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_mcp.engine.cache.flat import FLAT_FILE, FlatProblem, read_flat
from opd_mcp.engine.cache.shards import ContentHash, read_shard
from opd_mcp.engine.data.sequences import EOS, TRUNCATED, Sequences, concatenate
from opd_mcp.identity.lineage import read_manifest, verified_lineage
from opd_mcp.identity.panels import domains_of
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.cache import CacheManifest
from opd_mcp.schemas.errors import IntegrityError, OpdError
from opd_mcp.schemas.identity import ModelIdentity

ROUNDING = 1e-4
# what storing may add to a correct log-prob: float16 keeps 11 bits
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
RELATIVE = {"float32": 1e-5, "float16": 2**-11}

Rescore = Callable[[Sequences, int], np.ndarray]
"""From rows and k to their log-probs [T], as the teacher gives them now."""


class Verification(Schema):
    """The answer of `cache verify`; a cache is good when `problems` is empty."""

    cache: str
    rows: int = 0
    tokens: int = 0
    problems: list[str]
    rescored_rows: int = 0
    largest_difference: float | None = None

    def text(self) -> str:
        """For people."""
        lines = [f"{self.cache}: {self.rows} rows, {self.tokens} response tokens"]
        if self.largest_difference is not None:
            lines.append(
                f"{self.rescored_rows} rows scored again: largest difference {self.largest_difference:.3g} nats"
            )
        found = [f"PROBLEM {problem}" for problem in self.problems] or ["nothing is wrong"]
        return "\n".join([*lines, *found])


def verified(
    cache: Path, rescore: Rescore | None = None, *, sample: int = 16, teacher: ModelIdentity | None = None
) -> Verification:
    """Everything that is wrong with a cache; with `rescore`, `sample` rows are compared with the teacher.

    Of a cache of several teachers only the rows of `teacher` are compared. Raises ConsistencyError `teacher_mismatch`
    for one that is none of them.
    """
    try:
        manifest = read_manifest(cache)
    except OpdError as error:
        return Verification(cache=str(cache), problems=[error.message])
    problems: list[str] = []
    try:
        if verified_lineage(cache) is None:
            problems.append("there is no lineage.json that proves the manifest")
    except IntegrityError as error:
        problems.append(error.message)
    gap = manifest.engine_gap
    if gap is not None and not gap.mean <= gap.bound():
        problems.append(f"the behaviour log-probs are {gap.mean:.2g} nats from what scoring gives their student")
    parts, content = [], ContentHash()
    for shard in manifest.shards:
        try:
            rows = read_shard(cache / shard.file, sha256=shard.sha256)
        except (IntegrityError, OSError) as error:
            problems.append(error.message if isinstance(error, IntegrityError) else f"{shard.file} cannot be read")
            continue
        if (len(rows), len(rows.response_ids), len(rows.prompt_ids)) != (shard.rows, shard.tokens, shard.prompt_tokens):
            problems.append(f"{shard.file} has other counts than the manifest says")
        problems += [f"{shard.file}: {why}" for why in value_problems(rows, manifest)]
        content.add(rows)
        parts.append(rows)
    if len(parts) == len(manifest.shards) and content.hexdigest() != manifest.content_sha256:
        problems.append("the content's hash is not the manifest's")
    if (cache / FLAT_FILE).exists():
        try:
            read_flat(cache)
        except FlatProblem as problem:
            problems.append(f"{FLAT_FILE}: {problem.why}; training makes it again")
    chosen, largest = Sequences.empty(), None
    if rescore is not None and parts:
        chosen = _rows_to_score(concatenate(parts), manifest, teacher, sample)
        largest = _compared(chosen, rescore, manifest, problems)
    return Verification(
        cache=str(cache),
        rows=manifest.rows,
        tokens=manifest.tokens,
        problems=problems,
        rescored_rows=len(chosen),
        largest_difference=largest,
    )


def value_problems(rows: Sequences, manifest: CacheManifest) -> list[str]:
    """What no good cache holds: log-probs not finite or above 0, ids that are no tokens, reasons that do not fit."""
    problems = []
    columns: dict[str, NDArray[Any]] = dict(rows.columns)
    for name, values in columns.items():
        if values.dtype.kind != "f":
            continue
        if not np.isfinite(values).all():
            problems.append(f"{name} is not finite")
        elif (values > ROUNDING).any():
            problems.append(f"{name} is above 0")
    seen = rows.teacher_prompts
    ids = [
        rows.prompt_ids,
        rows.response_ids,
        *([seen.ids] if seen else []),
        *(v.ravel() for n, v in columns.items() if n == "topk_ids"),
    ]
    if any(((part < 0) | (part >= manifest.vocab_size)).any() for part in ids):
        problems.append("a token id is outside the vocabulary")
    if "topk_logprobs" in rows.columns and (np.diff(rows.columns["topk_logprobs"], axis=1) > 0).any():
        problems.append("top log-probs are not in order")
    ends = np.array(
        [len(rows.response(row)) > 0 and rows.response(row)[-1] in manifest.eos_token_ids for row in range(len(rows))]
    )
    reasons = np.asarray(rows.finish_reasons)
    if (ends[reasons == TRUNCATED]).any() or (~ends[reasons == EOS]).any():
        problems.append("a finish reason does not fit the last token")
    return problems


def _rows_to_score(rows: Sequences, manifest: CacheManifest, teacher: ModelIdentity | None, sample: int) -> Sequences:
    if manifest.teacher.members is not None:
        own = domains_of(manifest.teacher, teacher)
        rows = rows.take(np.flatnonzero([domain in own for domain in rows.domains]))
    return sampled_rows(rows, sample)


def sampled_rows(rows: Sequences, count: int) -> Sequences:
    """Up to `count` rows, evenly spread."""
    return rows.take(np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)))


def _compared(chosen: Sequences, rescore: Rescore, manifest: CacheManifest, problems: list[str]) -> float:
    stored = chosen.columns["teacher_logprobs"].astype(np.float64)
    difference = np.abs(rescore(chosen.for_teacher(), manifest.topk).astype(np.float64) - stored)
    allowed = TOLERANCE[manifest.dtype] + RELATIVE[manifest.dtype] * np.abs(stored)
    if manifest.teacher.remote is not None:
        allowed = allowed + TOLERANCE["float16"]  # another engine
    if (difference > allowed).any():
        problems.append(f"the teacher's log-probs differ by up to {difference.max():.3g} nats from the stored ones")
    return float(difference.max(initial=0.0))
