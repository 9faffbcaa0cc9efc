"""From the paper authors' Parquet to a teacher cache, with the list of what it lacks.

Their rows: `prompt`, and `metadata` with `response_tokens`, `loss_mask` and `teacher_log_probs`, one value per response
token. Rollouts went through text there, so the stop token is gone, and nothing says who drew or scored them.
"""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from opd_mcp.engine.cache.manifest import RolloutTally, write_manifest
from opd_mcp.engine.cache.shards import ContentHash, write_shard
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.encoding import chat_of, recorded_moment
from opd_mcp.engine.data.sequences import EOS, build_sequences
from opd_mcp.engine.models.loading import adopt_tokenizer
from opd_mcp.engine.provenance import Provenance, full_identity, record_lineage
from opd_mcp.identity.chat.tokenizer import ChatTokenizer
from opd_mcp.identity.data.rows import PromptRow
from opd_mcp.identity.files import file_sha256, publish_directory
from opd_mcp.identity.lineage import MANIFEST_FILE
from opd_mcp.identity.models import inspect_model, text_hash
from opd_mcp.schemas.cache import CacheManifest, Hygiene, ScoreStatistics, Shard
from opd_mcp.schemas.errors import ArgumentError, DataError
from opd_mcp.schemas.identity import Parent, TeacherClaim
from opd_mcp.schemas.recipes import PromptingRecipe, Sampling, ScoreRecipe

SHARD_ROWS = 4096
UNKNOWN = "unknown"
PROVENANCE = ["behaviour_logprobs", "sampling", "seed", "teacher's identity", "behaviour policy's identity"]


def converted(source: Path, output: Path, *, student: Path, teacher_name: str) -> CacheManifest:
    """The manifest of a new cache at `output`; teacher and student are asserted, since the file names neither.

    Rows whose lists differ in length, whose values are no log-probs or whose mask has holes are left out and counted.
    Raises ArgumentError for an output that exists, DataError `unknown_format` or `empty_data`.
    """
    if output.exists():
        raise ArgumentError("invalid_argument", "The output exists.", value=output, fix="Give a new directory.")
    adopted, facts = adopt_tokenizer(student, PromptingRecipe()), inspect_model(student)
    context = Context()
    chat = chat_of(adopted.tokenizer, context.prompting, context.rendered_at)
    moment = recorded_moment(adopted.tokenizer, context)
    building = output.with_name(f".{output.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    tally, content, bad, ended, clipped = RolloutTally(), ContentHash(), Counter[str](), 0, 0.0
    for batch in _batches(source):
        good = []
        for row in batch:
            problem = _problem(row, facts.vocab_size)
            if problem:
                bad[problem] += 1
            else:
                good.append(row)
        if not good:
            continue
        rows = _sequences(good, chat, adopted.eos_token_ids, sum(shard.rows for shard in shards))
        ended += sum(reason == EOS for reason in rows.finish_reasons)
        clipped += float(rows.columns["teacher_logprobs"].sum(dtype=np.float64))
        shards.append(write_shard(building / f"shard-{len(shards):05d}.parquet", rows))
        tally.add(rows)
        content.add(rows)
    if not shards:
        raise DataError("empty_data", "No row can be used.", value=dict(bad), fix="Give the authors' scored Parquet.")
    behaviour, tokens = full_identity(student), sum(shard.tokens for shard in shards)
    claim = TeacherClaim(basis="asserted", name=teacher_name)
    teacher = behaviour.model_copy(
        update={
            "name": teacher_name,
            "weights": text_hash(f"named:{teacher_name}"),
            "configuration": None,
            "remote": "named",
            "weights_full": None,
        }
    )
    adopted.save(building / "tokenizer")
    sampling, mean = Sampling(), clipped / max(1, tokens)
    manifest = CacheManifest(
        teacher=teacher,
        behaviour=behaviour,
        sft_teacher=claim,
        prompts_sha256=file_sha256(source),
        sampling=sampling,
        seed=0,
        eos_token_ids=list(adopted.eos_token_ids),
        topk=0,
        dtype="float32",
        vocab_size=facts.vocab_size,
        shards=shards,
        content_sha256=content.hexdigest(),
        rollouts=tally.statistics(),
        scores=ScoreStatistics(mean_teacher_logprob=mean),
        hygiene=Hygiene(prompts=tally.statistics().rows + bad.total(), quarantined=dict(bad)),
        rendered_at=moment,
        lacks=PROVENANCE if ended else ["EOS", *PROVENANCE],
    )
    write_manifest(building, manifest)
    parents = [Parent(role="prompts", sha256=manifest.prompts_sha256)]
    made = Provenance("cache", "convert", ScoreRecipe(), parents, [MANIFEST_FILE])
    record_lineage(building, made, context, sft_teacher=claim, rendered_at=moment)
    publish_directory(building, output)
    return manifest


def _batches(source: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError("unknown_format", "This is not Parquet.", value=source, fix="Give a .parquet file.") from error
    if not {"prompt", "metadata"} <= set(file.schema_arrow.names):
        raise DataError(
            "unknown_format",
            f"The authors' files have prompt and metadata; this one has {', '.join(file.schema_arrow.names)}.",
            value=source,
            fix="Give the file that their scoring script wrote.",
        )
    return (batch.to_pylist() for batch in file.iter_batches(batch_size=SHARD_ROWS, columns=["prompt", "metadata"]))


def _problem(row: dict[str, Any], vocab_size: int) -> str | None:
    metadata = row["metadata"] or {}
    tokens, mask, scores = (metadata.get(name) for name in ("response_tokens", "loss_mask", "teacher_log_probs"))
    if not tokens or scores is None or len(tokens) != len(scores) or (mask is not None and len(mask) != len(tokens)):
        return "lists of different length"
    if mask is not None and mask != sorted(mask, reverse=True):
        return "loss mask with holes"
    if not all(0 <= token < vocab_size for token in tokens):
        return "token id outside the vocabulary"
    values = np.asarray(scores, dtype=np.float64)
    if not (np.isfinite(values).all() and (values <= 1e-4).all()):
        return "not a log-prob"
    return None if row["prompt"] else "no prompt"


def _sequences(rows: list[dict[str, Any]], chat: ChatTokenizer, stops: Collection[int], before: int) -> Any:
    prompts, responses, scores, reasons = [], [], [], []
    for row in rows:
        metadata, prompt = row["metadata"], row["prompt"]
        mask = metadata.get("loss_mask")
        count = sum(mask) if mask is not None else len(metadata["response_tokens"])
        asked = PromptRow("", prompt=prompt) if isinstance(prompt, str) else PromptRow("", messages=tuple(prompt))
        prompts.append(chat.prompt_ids(asked))
        responses.append(metadata["response_tokens"][:count])
        scores += metadata["teacher_log_probs"][:count]
        reasons.append(EOS if responses[-1] and responses[-1][-1] in stops else UNKNOWN)
    return build_sequences(
        prompts,
        responses,
        columns={"teacher_logprobs": np.asarray(scores, dtype=np.float32)},
        finish_reasons=reasons,
        prompt_row_ids=[str(before + number) for number in range(len(rows))],
    )
