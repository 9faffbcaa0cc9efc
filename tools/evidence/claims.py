"""From rows per arm and seed to paired differences, and to a verdict on each claim about the method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from opd_mcp.grading.paired import mean_over_seeds
from tools.evidence.arms import ARMS, Row

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
)
MEASURES = ("accuracy", "reverse_kl", "processor_seconds")


@dataclass(frozen=True)
class Claim:
    """What is said of the method: that the first arm of a pair is better, alike, or cheaper than the second."""

    text: str
    pair: tuple[str, str]
    kind: Literal["better", "alike", "cheaper"]


CLAIMS: tuple[Claim, ...] = (
    Claim("Lightning OPD improves on its SFT student.", ("lightning_sampled", "sft"), "better"),
    Claim("Lightning matches live OPD at equal steps, sampled.", ("lightning_sampled", "live_sampled"), "alike"),
    Claim("Lightning matches live OPD at equal steps, top-k.", ("lightning_topk", "live_topk"), "alike"),
    Claim("Lightning with its cache takes less than live, sampled.", ("lightning_sampled", "live_sampled"), "cheaper"),
    Claim("Lightning with its cache takes less than live, top-k.", ("lightning_topk", "live_topk"), "cheaper"),
    Claim("Lightning is as good as TRL's live trainer.", ("lightning_topk", "trl_live"), "alike"),
    Claim("A teacher that is not the SFT teacher loses.", ("lightning_sampled", "mismatched"), "better"),
    Claim("Repaired scores win back what a mismatch costs (Lightning OPD 2.0).", ("repaired", "mismatched"), "better"),
    Claim("The teacher's scores are better than none (OPSA).", ("lightning_sampled", "opsa"), "better"),
    Claim("The same compute in further SFT is worse.", ("lightning_sampled", "sft_more"), "better"),
    Claim("Two rounds are better than one.", ("rounds_2", "lightning_sampled"), "better"),
    Claim("Four rounds are better than one.", ("rounds_4", "lightning_sampled"), "better"),
    Claim("The first 10 % of the tokens match all of them.", ("horizon_10", "lightning_sampled"), "alike"),
    Claim("The first 30 % of the tokens match all of them.", ("horizon_30", "lightning_sampled"), "alike"),
    Claim("A LoRA adapter matches full training.", ("lora", "lightning_sampled"), "alike"),
)
OUT_OF_REACH = (
    "Lightning OPD brings Qwen3-8B-Base to 69.9 % on AIME 2024 with Qwen3-32B as the teacher (arXiv 2604.13010).",
    "Lightning OPD takes 20 GPU hours where live OPD takes 72 (4B, arXiv 2604.13010).",
)


def figures_of(rows: Rows) -> dict[str, Any]:
    """A task's part of `evidence.json`: its arms and the paired differences of those that were measured."""
    arms = {
        arm: {
            "seeds": sorted(rows[arm]),
            **{name: [round(getattr(rows[arm][seed], name), 5) for seed in sorted(rows[arm])] for name in MEASURES},
            "stages": stage_means(list(rows[arm].values())),
        }
        for arm in ARMS
        if rows.get(arm)
    }
    differences = {f"{first} - {second}": paired_difference(rows, first, second) for first, second in PAIRS}
    paired = {name: found for name, found in differences.items() if found}
    return {"arms": arms, "paired": paired, "students_per_cache": shared_costs(rows)}


def stage_means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean processor seconds by stage."""
    names = dict.fromkeys(name for row in rows for name in row.seconds)
    return {name: round(mean(row.seconds.get(name, 0.0) for row in rows), 3) for name in names}


def paired_difference(rows: Rows, first: str, second: str) -> dict[str, Any] | None:
    """By measure, the mean difference over the seeds that both have, [value, low, high]; None for fewer than two."""
    seeds = sorted(rows.get(first, {}).keys() & rows.get(second, {}).keys())
    if len(seeds) < 2:
        return None
    found: dict[str, Any] = {"seeds": seeds}
    for name in MEASURES:
        gaps = [getattr(rows[first][seed], name) - getattr(rows[second][seed], name) for seed in seeds]
        estimate = mean_over_seeds(gaps)
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
    """Every claim on every task, with the interval that decides it; what no run here can decide is out of reach."""
    found = []
    for task, figures in tasks.items():
        for claim in CLAIMS:
            pair = figures["paired"].get(f"{claim.pair[0]} - {claim.pair[1]}")
            measure = "processor_seconds" if claim.kind == "cheaper" else "accuracy"
            interval = pair[measure] if pair else None
            told = {"task": task, "pair": list(claim.pair), "measure": measure, "difference": interval}
            if pair:
                told["seeds"] = len(pair["seeds"])
            found.append({"claim": claim.text, "verdict": verdict_on(claim.kind, interval), "figures": told})
    return [*found, *({"claim": text, "verdict": "out of reach", "figures": {}} for text in OUT_OF_REACH)]


def verdict_on(kind: str, interval: Sequence[float] | None) -> Verdict:
    """What an interval of a difference says; one that decides neither way leaves the claim out of reach."""
    if interval is None:
        return "out of reach"
    _, low, high = interval
    if kind == "cheaper":
        return "reproduced" if high < 0 else "refuted" if low > 0 else "out of reach"
    if kind == "better":
        return "reproduced" if low > 0 else "refuted" if high < 0 else "out of reach"
    return "reproduced" if low > -MARGIN else "refuted" if high < -MARGIN else "out of reach"
