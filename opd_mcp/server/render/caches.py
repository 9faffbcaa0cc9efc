"""A teacher cache in words, for the tool and the command line."""

from opd_mcp.schemas.cache import (
    CacheInspection,
    CacheManifest,
    EngineGap,
    PromptHygiene,
    RolloutStatistics,
    SampleRow,
    TeacherDelta,
)
from opd_mcp.schemas.texts import byte_size


def inspection_text(found: CacheInspection) -> str:
    """Figures, counts and the two sample rows."""
    lines = [
        f"{found.path}: {found.rows} rows, {found.tokens} response tokens, {found.shards} shards, "
        f"{byte_size(found.bytes)}",
        *manifest_lines(found.manifest),
        *(line for number, row in enumerate(found.sample) for line in _row_lines(number, row)),
    ]
    return "\n".join(lines)


def manifest_lines(manifest: CacheManifest) -> list[str]:
    """What the manifest says, one line a topic."""
    rollouts, hygiene, scores = manifest.rollouts, manifest.hygiene, manifest.scores
    claim = manifest.sft_teacher
    lines = [
        f"teacher {manifest.teacher.label()}, student {manifest.behaviour.label()}"
        + (f", SFT teacher {claim.label()} ({claim.basis})" if claim else ""),
        f"{manifest.dtype}, top {manifest.topk}, {_drawn_how(manifest)}content {manifest.content_sha256[:12]}",
        f"drawn: {rollouts_text(rollouts)}",
        f"prompts: {prompts_text(hygiene)}",
        f"truncated rollouts: {hygiene.on_truncated}; dropped {hygiene.truncated_dropped}, capped "
        f"{hygiene.truncated_capped}",
        f"mean log-prob: teacher {scores.mean_teacher_logprob:.4g}"
        + (
            ""
            if scores.mean_behaviour_logprob is None
            else f", student {scores.mean_behaviour_logprob:.4g}; reverse KL "
            f"k1 {scores.reverse_kl_k1:.4g}, k3 {scores.reverse_kl_k3:.4g}"
        ),
    ]
    if hygiene.quarantined:
        lines.append("left out: " + ", ".join(f"{count} × {reason}" for reason, count in hygiene.quarantined.items()))
    lines += measured_lines(manifest.teacher_delta, manifest.engine_gap)
    if manifest.lacks:
        lines.append("lacks: " + ", ".join(manifest.lacks))
    return lines


def _drawn_how(manifest: CacheManifest) -> str:
    if "seed" in manifest.lacks:
        return ""  # a converted cache's fields hold defaults, no settings
    return f"seed {manifest.seed}, temperature {manifest.sampling.temperature}, "


def rollouts_text(rollouts: RolloutStatistics) -> str:
    """How many rollouts there are, how long, and what is odd in them."""
    return (
        f"{rollouts.rows} rows of {rollouts.mean_response_tokens:.4g} tokens, truncated "
        f"{rollouts.truncated_fraction:.1%}, empty {rollouts.empty_responses}, duplicates {rollouts.duplicate_rows}"
    )


def prompts_text(hygiene: PromptHygiene) -> str:
    """How many prompts there are, and what is odd in them."""
    text = f"{hygiene.prompts}, over-long {hygiene.over_long_prompts}, duplicates {hygiene.duplicate_prompts}"
    if hygiene.eval_overlap_exact is None:
        return text
    return (
        f"{text}, in the evaluation set {hygiene.eval_overlap_exact} exactly, "
        f"{hygiene.eval_overlap_normalised} normalised"
    )


def measured_lines(delta: TeacherDelta | None, gap: EngineGap | None) -> list[str]:
    """How far teacher and SFT teacher, and generator and scorer, are apart, and how that is known."""
    lines = []
    if delta is not None and delta.basis == "by_construction":
        lines.append("teacher delta: 0 by construction, since teacher and SFT teacher have the same weights")
    elif delta is not None:
        over = f"over 1 nat {delta.over_one_nat:.1%} of {delta.tokens} tokens"
        lines.append(f"teacher delta: mean |Δ| {delta.mean_abs:.3g}, {over}")
    if gap is not None:
        lines.append(f"engine gap: mean {gap.mean:.3g}, largest {gap.largest:.3g} nats over {gap.tokens} tokens")
    return lines


def _row_lines(number: int, row: SampleRow) -> list[str]:
    pairs = " ".join(f"{token!r} " + "/".join(f"{value:.3g}" for value in values) for token, *values in row.tokens)
    return [
        f"row {number}: {row.prompt!r} → {row.response!r} ({row.finish_reason}, {row.response_tokens} tokens)",
        f"  token teacher/student: {pairs}",
    ]
