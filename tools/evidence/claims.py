"""From rows per arm and seed to paired differences, and to a verdict on each claim about the method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from opd_mcp.grading.paired import mean_over_seeds
from tools.evidence.arms import ARMS, DRIFT, MORE, OBJECTIVES, ONE_TASK, Row

Kind = Literal["better", "worse", "alike", "cheaper"]
Verdict = Literal["reproduced", "refuted", "out of reach"]
Rows = Mapping[str, Mapping[int, Row]]
MARGIN = 0.05
"""Arms whose accuracies differ by less are called alike; fixed before anything was measured."""
PAIRS: tuple[tuple[str, str], ...] = (
    ("lightning_sampled", "live_sampled"),
    ("lightning_topk", "live_topk"),
    ("lightning_topk", "trl_live"),
    ("lightning_sampled", "sft"),
    ("lightning_sampled", "mismatched"),
    ("repaired", "mismatched"),
    ("lightning_sampled", "opsa"),
    ("lightning_sampled", "sft_more"),
    ("rounds_2", "lightning_sampled"),
    ("rounds_4", "lightning_sampled"),
    ("horizon_10", "lightning_sampled"),
    ("horizon_30", "lightning_sampled"),
    ("lora", "lightning_sampled"),
    ("live_sampled", "live_mismatched"),
    ("repaired", "lightning_sampled"),
    ("repaired_consistent", "lightning_sampled"),
    ("lightning_third", "lightning_sampled"),
    ("lightning_topk_quarter", "trl_live"),
    *OBJECTIVES.items(),
)
CONTRASTS: Mapping[str, Mapping[str, float]] = {
    **{f"{first} - {second}": {first: 1.0, second: -1.0} for first, second in PAIRS},
    "(lightning_sampled - mismatched) - (live_sampled - live_mismatched)": {
        "lightning_sampled": 1.0,
        "mismatched": -1.0,
        "live_sampled": -1.0,
        "live_mismatched": 1.0,
    },
    "repaired - (lightning_sampled + mismatched) / 2": {"repaired": 1.0, "lightning_sampled": -0.5, "mismatched": -0.5},
}
"""Sums of arms by their weights, paired by seed."""
MEASURES = ("accuracy", "reverse_kl", "processor_seconds")


@dataclass(frozen=True)
class Claim:
    """What is said of the method: that a contrast of arms is above zero, below, about zero or more, or costs less."""

    text: str
    contrast: str
    kind: Kind


def _claim(text: str, first: str, kind: Kind, second: str) -> Claim:
    return Claim(text, f"{first} - {second}", kind)


SAMPLED = "lightning_sampled"
CLAIMS: tuple[Claim, ...] = (
    _claim("Lightning OPD improves on its SFT student.", SAMPLED, "better", "sft"),
    _claim("Lightning matches live OPD at equal steps, sampled.", SAMPLED, "alike", "live_sampled"),
    _claim("Lightning matches live OPD at equal steps, top-k.", "lightning_topk", "alike", "live_topk"),
    _claim("Lightning with its cache takes less than live, sampled.", SAMPLED, "cheaper", "live_sampled"),
    _claim("Lightning with its cache takes less than live, top-k.", "lightning_topk", "cheaper", "live_topk"),
    _claim("The gain is nearly complete after a third of the steps.", "lightning_third", "alike", SAMPLED),
    _claim("A teacher that is not the SFT teacher loses, lightning.", SAMPLED, "better", "mismatched"),
    _claim("A teacher that is not the SFT teacher loses, live.", "live_sampled", "better", "live_mismatched"),
    Claim(
        "Lightning loses more by such a teacher than live.",
        "(lightning_sampled - mismatched) - (live_sampled - live_mismatched)",
        "better",
    ),
    _claim("Repaired scores win back what a mismatch costs (Lightning OPD 2.0).", "repaired", "better", "mismatched"),
    Claim(
        "Repaired scores win back half of what consistency gives, or more.",
        "repaired - (lightning_sampled + mismatched) / 2",
        "better",
    ),
    _claim("Repaired scores make up for a consistent teacher (Lightning OPD 2.0).", "repaired", "alike", SAMPLED),
    _claim("Repaired scores do no harm where the teacher is consistent.", "repaired_consistent", "alike", SAMPLED),
    _claim("The teacher's scores are better than none (OPSA as control).", SAMPLED, "better", "opsa"),
    _claim("The same compute in further SFT is worse.", SAMPLED, "better", "sft_more"),
    _claim("Two rounds are better than one.", "rounds_2", "better", SAMPLED),
    _claim("Four rounds are better than one.", "rounds_4", "better", SAMPLED),
    _claim("The first 10 % of the tokens match all of them (TOPD).", "horizon_10", "alike", SAMPLED),
    _claim("The first 30 % of the tokens match all of them.", "horizon_30", "alike", SAMPLED),
    _claim("A growing horizon matches all tokens (POPD).", "horizon_growing", "alike", SAMPLED),
    _claim("Extrapolation beyond the teacher is better (ExOPD, λ = 1.25).", "extrapolated", "better", SAMPLED),
    _claim("A KL penalty towards π_ref is better (λ = 0.8).", "reference_kl", "better", SAMPLED),
    _claim("On a frozen cache IW-OPD's weights lose (Lightning OPD 2.0).", "iw_opd", "worse", SAMPLED),
    _claim("With fresh rollouts IW-OPD's weights gain.", "live_iw_opd", "better", "live_sampled"),
    _claim("On stale rollouts the forward KL is better (AsyncOPD).", "forward_kl", "better", "lightning_topk"),
    _claim("A generalised JSD is better than the reverse KL (GKD, β = 0.1).", "js_10", "better", "lightning_topk"),
    _claim("A generalised JSD is better than the reverse KL (GKD, β = 0.5).", "js_50", "better", "lightning_topk"),
    _claim("A generalised JSD is better than the reverse KL (GKD, β = 0.9).", "js_90", "better", "lightning_topk"),
    _claim("KLs mixed by the teacher's entropy are better.", "entropy_mixed", "better", "lightning_topk"),
    _claim("Half of the tokens, by the teacher's entropy, match all.", "entropy_50", "alike", "lightning_topk"),
    _claim("A LoRA adapter matches full training.", "lora", "alike", SAMPLED),
    _claim("Lightning is as good as TRL's live trainer.", "lightning_topk", "alike", "trl_live"),
    _claim("With a quarter of the steps it is so still.", "lightning_topk_quarter", "alike", "trl_live"),
)
OUT_OF_REACH = (
    "Lightning OPD brings Qwen3-8B-Base to 69.9 % on AIME 2024 with Qwen3-32B as the teacher (arXiv 2604.13010).",
    "Lightning OPD brings Qwen3-4B-Base to 68.1 % on AIME 2024, live OPD to 65.4 % (arXiv 2604.13010).",
    "Lightning OPD takes 20 GPU hours where live OPD takes 72 (4B), and 30 instead of 120 (8B, arXiv 2604.13010).",
    "Lightning OPD trains a student of 30B-A3B for which live OPD has not enough memory (arXiv 2604.13010).",
    "Rollouts longer than 4096 tokens give no gain (arXiv 2604.13010).",
)


def figures_of(rows: Rows) -> dict[str, Any]:
    """A task's part of `evidence.json`: its arms and the paired differences of those that were measured."""
    arms = {
        arm: {
            "seeds": sorted(rows[arm]),
            **{name: [round(getattr(rows[arm][seed], name), 5) for seed in sorted(rows[arm])] for name in MEASURES},
            "stages": stage_means(list(rows[arm].values())),
        }
        for arm in (*ARMS, *MORE)
        if rows.get(arm)
    }
    for arm, figures in arms.items():
        if None not in (drifts := [rows[arm][seed].drift for seed in sorted(rows[arm])]):
            figures[DRIFT] = [round(drift or 0.0, 5) for drift in drifts]
    differences = {name: paired_contrast(rows, weights) for name, weights in CONTRASTS.items()}
    paired = {name: found for name, found in differences.items() if found}
    return {"arms": arms, "paired": paired, "students_per_cache": shared_costs(rows)}


def stage_means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean processor seconds by stage."""
    names = dict.fromkeys(name for row in rows for name in row.seconds)
    return {name: round(mean(row.seconds.get(name, 0.0) for row in rows), 3) for name in names}


def paired_contrast(rows: Rows, weights: Mapping[str, float]) -> dict[str, Any] | None:
    """By measure, the mean of the weighted sum over the seeds that all arms have, [value, low, high]; else None."""
    seeds = sorted(set.intersection(*(set(rows.get(arm, {})) for arm in weights)))
    if len(seeds) < 2:
        return None
    found: dict[str, Any] = {"seeds": seeds}
    for name in MEASURES:
        sums = [sum(weight * getattr(rows[arm][seed], name) for arm, weight in weights.items()) for seed in seeds]
        estimate = mean_over_seeds(sums)
        assert estimate is not None, "two seeds have a spread"
        found[name] = [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]
    return found


def shared_costs(rows: Rows) -> dict[str, list[float]]:
    """Processor seconds per student beyond its SFT, where 1, 2 or 5 students share a cache, by arm."""
    found = {}
    for arm in ("lightning_sampled", "live_sampled", "lightning_topk", "live_topk"):
        if rows.get(arm):
            means = stage_means(list(rows[arm].values()))
            once = means.get("rollout", 0.0) + means.get("score", 0.0)
            found[arm] = [round(once / students + means.get("distill", 0.0), 3) for students in (1, 2, 5)]
    return found


def claims_of(tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claim on every task that has its arms, with the interval that decides it; of others none is in reach."""
    found = []
    for task, figures in tasks.items():
        for claim in CLAIMS:
            pair = figures["paired"].get(claim.contrast)
            measure = "processor_seconds" if claim.kind == "cheaper" else "accuracy"
            weights = CONTRASTS[claim.contrast]
            if task != "arithmetic" and ONE_TASK & weights.keys():
                continue
            interval = pair[measure] if pair else None
            told = {"task": task, "contrast": claim.contrast, "measure": measure, "difference": interval}
            if pair:
                told["seeds"] = len(pair["seeds"])
                told["means"] = {arm: _mean_of(figures["arms"][arm], pair["seeds"], measure) for arm in weights}
            found.append({"claim": claim.text, "verdict": verdict_on(claim.kind, interval), "figures": told})
    return [*found, *({"claim": text, "verdict": "out of reach", "figures": {}} for text in OUT_OF_REACH)]


def _mean_of(arm: Mapping[str, Any], seeds: Sequence[int], measure: str) -> float:
    """An arm's mean over the seeds of a contrast."""
    return round(mean(value for seed, value in zip(arm["seeds"], arm[measure], strict=True) if seed in seeds), 5)


def verdict_on(kind: Kind, interval: Sequence[float] | None) -> Verdict:
    """What an interval of a difference says; one that decides neither way leaves the claim out of reach."""
    if interval is None:
        return "out of reach"
    _, low, high = interval
    if kind in ("cheaper", "worse"):
        return "reproduced" if high < 0 else "refuted" if low > 0 else "out of reach"
    if kind == "better":
        return "reproduced" if low > 0 else "refuted" if high < 0 else "out of reach"
    return "reproduced" if low > -MARGIN else "refuted" if high < -MARGIN else "out of reach"
