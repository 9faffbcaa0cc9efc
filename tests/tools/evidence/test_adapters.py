"""LoRA against full training: one short pair, and the table of figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd_mcp.schemas.recipes import Recipe
from tools import EXAMPLE
from tools.demo.tune import Place
from tools.evidence.adapters import Figures, chosen_rates, distilled, evaluated, table

SHORT = {
    "responses.limit": 16,
    "responses.sampling.max_new_tokens": 8,
    "sft.steps": 2,
    "sft.batch_size": 8,
    "sft.on_truncated": "keep",
    "rollout.count": 16,
    "rollout.sampling.max_new_tokens": 8,
    "distill.steps": 2,
    "distill.batch_size": 8,
    "benchmark.limit": 6,
    "benchmark.kl_prompts": 4,
    "benchmark.sampling.max_new_tokens": 8,
}


@dataclass(frozen=True)
class ShortPlace(Place):
    """The task with a few steps of everything."""

    def recipe(self, overrides: Any) -> Recipe:
        return super().recipe({**SHORT, **overrides})


def test_both_ways_distill_one_student_from_one_cache(tmp_path: Path) -> None:
    place = ShortPlace("arithmetic", EXAMPLE / "student", tmp_path)
    full, lora = (distilled(place, 61, way, 3e-3) for way in ("full", "lora"))
    assert lora["trained_parameters"] < full["trained_parameters"] / 2
    scores = evaluated(place, 61, {"full": 3e-3, "lora": 3e-3})
    assert set(scores) == {"sft", "full", "lora"}
    assert len({score["reverse_kl"] for score in scores.values()}) == 3, "both were trained, each in its way"
    (folder,) = tmp_path.glob("seed-61-*")
    assert {path.name for path in folder.iterdir()} >= {"sft", "cache", "full", "lora", "report"}


def row(accuracy: float, seconds: float, parameters: int) -> dict[str, float]:
    measured = {"accuracy": accuracy, "reverse_kl": 0.1, "seconds": seconds, "grown_bytes": 2.0**21}
    return measured | {"trained_parameters": parameters}


def test_the_table_pairs_by_seed_and_leaves_out_what_is_not_evaluated_yet(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = Figures(file)
    found = figures.of("arithmetic")
    found["tuning"] = {
        "full": {"0.001": {"100": 0.5, "101": 0.9}, "0.003": {"100": 0.8, "101": 0.7}},
        "lora": {"0.01": {"100": 0.6}, "0.02": {"100": 0.6}},
    }
    sft = {"accuracy": 0.4, "reverse_kl": 0.5}
    found["seeds"] = {
        "61": {"sft": sft, "full": row(0.8, 10.0, 1000), "lora": row(0.9, 5.0, 100)},
        "62": {"sft": sft, "full": row(0.7, 10.0, 1000), "lora": row(0.6, 8.0, 100)},
        "63": {"full": row(0.7, 10.0, 1000)},
    }
    figures.keep()
    assert Figures(file).of("arithmetic") == found, "an interrupted call goes on from the file"
    assert chosen_rates(found["tuning"]) == pytest.approx({"full": 0.003, "lora": 0.01})
    text = "\n".join(table(found))
    assert "| 61 | 0.400; 0.500 | 0.800; 0.100 | 0.900; 0.100 | +0.100 | 0.50 |" in text
    assert "| 63 |" not in text
    assert "accuracy: +0.000 [-1.271, +1.271] over 2 seeds" in text  # 12.71 · 0.1414 / √2
    assert "lora: rate 0.01 (on tune.jsonl 0.01: 0.600, 0.02: 0.600), 100 trained parameters" in text
