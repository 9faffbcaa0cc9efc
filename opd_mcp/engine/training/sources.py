"""What a distillation learns from, opened and checked before any step: a teacher cache, or a live teacher."""

from dataclasses import dataclass
from pathlib import Path

from opd_mcp.engine.cache.flat import open_flat
from opd_mcp.engine.cache.manifest import read_manifest
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.prompts import EncodedPrompt, encode_prompts
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.engine.models.loading import AdoptedTokenizer, adopt_tokenizer
from opd_mcp.engine.provenance import full_identity
from opd_mcp.identity.consistency import require_behaviour, require_consistent
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.lineage import verified_lineage
from opd_mcp.identity.tokenizers import require_same_tokens
from opd_mcp.schemas.errors import ConsistencyError
from opd_mcp.schemas.identity import ModelIdentity, Parent, TeacherClaim
from opd_mcp.schemas.recipes import DistillRecipe


@dataclass(frozen=True)
class CacheSource:
    """An opened teacher cache."""

    sequences: Sequences
    teacher: ModelIdentity
    adopted: AdoptedTokenizer
    parents: list[Parent]


@dataclass(frozen=True)
class LiveSource:
    """Prompts for rollouts that a live teacher will score."""

    prompts: list[EncodedPrompt]
    teacher: ModelIdentity
    adopted: AdoptedTokenizer
    parents: list[Parent]


def open_cache(
    recipe: DistillRecipe,
    cache: Path,
    student: Path,
    claim: TeacherClaim | None,
    *,
    allowed: bool,
    context: Context,
) -> CacheSource:
    """The cache's rows, proven to belong to this student and its SFT teacher.

    Raises ConsistencyError `behaviour_mismatch`, `teacher_mismatch`, `lineage_missing`, or `topk_missing` for a cache
    with fewer teacher tokens than the estimator needs; IntegrityError `damaged_file` or `lineage_mismatch`.
    """
    verified_lineage(cache)
    manifest = read_manifest(cache)
    require_behaviour(manifest.behaviour, full_identity(student))
    require_consistent(manifest.teacher, claim or manifest.sft_teacher, allowed=allowed)
    if recipe.estimator != "sampled" and manifest.topk < recipe.topk:
        raise ConsistencyError(
            "topk_missing",
            f"The estimator needs the teacher's top {recipe.topk}, the cache holds its top {manifest.topk}.",
            value=manifest.topk,
            fix=f"Build the cache with topk={recipe.topk}, or use estimator='sampled'.",
        )
    sequences = open_flat(cache)
    parents = [
        Parent(role="teacher", identity=manifest.teacher),
        Parent(role="cache", sha256=manifest.content_hash()),
    ]
    return CacheSource(sequences, manifest.teacher, adopt_tokenizer(cache / "tokenizer", context.prompting), parents)


def open_live(
    teacher: Path, prompts: Path, student: Path, claim: TeacherClaim | None, *, allowed: bool, context: Context
) -> LiveSource:
    """The prompts as the teacher's template encodes them, once teacher and student are proven to fit.

    Raises ConsistencyError `tokenizer_mismatch`, `teacher_mismatch` or `lineage_missing`.
    """
    require_same_tokens(teacher, student)
    identity = full_identity(teacher)
    require_consistent(identity, claim, allowed=allowed)
    adopted = adopt_tokenizer(teacher, context.prompting)
    rows = read_prompts(prompts)
    parents = [Parent(role="teacher", identity=identity), Parent(role="prompts", sha256=prompts_hash(rows))]
    return LiveSource(encode_prompts(rows, adopted.tokenizer, context), identity, adopted, parents)
