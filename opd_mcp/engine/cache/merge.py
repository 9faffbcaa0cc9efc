"""Several teacher caches of one teacher and one student as one."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opd_mcp.engine.cache.manifest import RolloutTally, ScoreTally, write_manifest
from opd_mcp.engine.cache.shards import ContentHash, read_shard
from opd_mcp.identity.files import publish_directory
from opd_mcp.identity.lineage import MANIFEST_FILE, data_hashes, read_manifest, verified_lineage, write_lineage
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.cache import CacheManifest, Hygiene, Shard
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError
from opd_mcp.schemas.identity import Lineage, ModelIdentity, Parent

SAME = ("topk", "dtype", "vocab_size", "eos_token_ids", "sampling", "sft_teacher", "teacher_mismatch_allowed", "lacks")


def merged(output: Path, caches: Sequence[Path]) -> CacheManifest:
    """The manifest of a new cache at `output` with the rows of all caches, in order, each shard checked and copied.

    Raises ArgumentError `invalid_argument` for fewer than two caches or an output that exists, ConsistencyError
    `teacher_mismatch` or `behaviour_mismatch` or `caches_differ`, IntegrityError for a damaged cache.
    """
    if len(caches) < 2 or output.exists():
        raise ArgumentError(
            "invalid_argument",
            "A merge takes two or more caches and a directory that does not exist yet.",
            value=output,
            fix="Give: opd-mcp cache merge NEW CACHE CACHE …",
        )
    for cache in caches:
        verified_lineage(cache)
    manifests = [read_manifest(cache) for cache in caches]
    for manifest in manifests[1:]:
        _require_same(manifests[0], manifest)
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shards: list[Shard] = []
    rollouts, scores, content = RolloutTally(), ScoreTally(), ContentHash()
    for cache, manifest in zip(caches, manifests, strict=True):
        for shard in manifest.shards:
            rows = read_shard(cache / shard.file, sha256=shard.sha256)
            name = f"shard-{len(shards):05d}.parquet"
            shutil.copyfile(cache / shard.file, building / name)
            shards.append(shard.model_copy(update={"file": name}))
            rollouts.add(rows)
            if manifest.has_behaviour:
                scores.add(rows, 0)
            content.add(rows)
    statistics = scores.statistics() if manifests[0].has_behaviour else manifests[0].scores
    whole = manifests[0].model_copy(
        update={
            "teacher": _seen_by_all([manifest.teacher for manifest in manifests]),
            "prompts_sha256": content_hash([manifest.prompts_sha256 for manifest in manifests]),
            "shards": shards,
            "domains": _domains(manifests),
            "content_sha256": content.hexdigest(),
            "layout": None,
            "rollouts": rollouts.statistics(),
            "scores": statistics.model_copy(
                update={"clamped_values": sum(manifest.scores.clamped_values for manifest in manifests)}
            ),
            "hygiene": _hygiene([manifest.hygiene for manifest in manifests]),
        }
    )
    shutil.copytree(caches[0] / "tokenizer", building / "tokenizer")
    write_manifest(building, whole)
    lineage = Lineage(
        kind="cache",
        stage="merge",
        recipe={"caches": [manifest.content_sha256 for manifest in manifests]},
        sft_teacher=whole.sft_teacher,
        teacher_mismatch_allowed=whole.teacher_mismatch_allowed,
        parents=[
            Parent(role="teacher", identity=whole.teacher),
            Parent(role="student", identity=whole.behaviour),
            *(Parent(role="cache", sha256=manifest.content_hash()) for manifest in manifests),
        ],
        files=data_hashes(building, [MANIFEST_FILE]),
    )
    write_lineage(building, lineage)
    publish_directory(building, output)
    return whole


def _domains(manifests: Sequence[CacheManifest]) -> dict[str, int] | None:
    rows: Counter[str] = Counter()
    for manifest in manifests:
        rows.update(manifest.domains or {})
    return dict(rows) or None


def _seen_by_all(teachers: Sequence[ModelIdentity]) -> ModelIdentity:
    """The one teacher, with the messages of its own that the prompts of all caches have."""
    context = teachers[0].context
    if context is None or context.rows is None:
        return teachers[0]
    rows = content_hash([teacher.context.rows for teacher in teachers if teacher.context])
    return teachers[0].model_copy(update={"context": context.model_copy(update={"rows": rows})})


def _require_same(first: CacheManifest, other: CacheManifest) -> None:
    for code, role in (("teacher_mismatch", "teacher"), ("behaviour_mismatch", "behaviour")):
        one, two = getattr(first, role), getattr(other, role)
        if not one.same_model(two) or one.tokenizer != two.tokenizer or not one.same_context(two):
            raise ConsistencyError(
                code,
                f"The caches are not of one {role}: {one.label()} and {two.label()}.",
                value=two.label(),
                fix="Merge caches of the same teacher and student only.",
            )
    if (first.domains is None) != (other.domains is None):
        raise ConsistencyError(
            "caches_differ",
            "The rows of only one of the caches have a teacher_domain.",
            value=sorted(first.domains or other.domains or ()),
            fix="Build both from prompts with a teacher_domain, or both from prompts without.",
        )
    differing = [name for name in SAME if getattr(first, name) != getattr(other, name)]
    if differing:
        raise ConsistencyError(
            "caches_differ",
            f"The caches differ in {', '.join(differing)}.",
            value=getattr(other, differing[0]),
            fix="Build both with the same settings.",
        )


def _hygiene(counts: Sequence[Hygiene]) -> Hygiene:
    summed = ("prompts", "over_long_prompts", "duplicate_prompts", "truncated_dropped", "truncated_capped")
    quarantined: Counter[str] = Counter()
    for count in counts:
        quarantined.update(count.quarantined)
    return Hygiene(
        on_truncated=counts[0].on_truncated,
        quarantined=dict(quarantined),
        **{name: sum(getattr(count, name) for count in counts) for name in summed},
    )
