"""The tables of docs/performance.md from a report of `tools/gpu/check.py --json`.

Run: `python tools/docs/gpu_table.py docs/gpu-h200.json`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


GIB = 2**30


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def speed_rows(speeds: dict[str, Any]) -> list[list[str]]:
    """One row per shape: training, scoring, ratios and memory."""
    return [
        [
            name,
            f"{found['training_tokens_per_second']:,.0f}",
            f"{100 * found['training_utilisation']:.1f} %",
            f"{found['scoring_tokens_per_second']:,.0f}",
            f"{100 * found['scoring_utilisation']:.1f} %",
            f"{found['two_pass_over_ours']:.2f}",
            f"{found['naive_over_ours']:.2f}",
            f"{found['plain_layers_over_ours']:.2f}",
            f"{found['peak_bytes'] / GIB:.1f} GiB",
            f"{found['peak_bytes'] / found['estimated_bytes']:.2f}",
            f"{found['seconds_to_compile']:.0f} s",
        ]
        for name, found in speeds.items()
    ]


def generation_rows(generation: dict[str, Any]) -> list[list[str]]:
    """One row per variant: tokens per second for rows of one length, and for rows that stop early."""

    def shown(rate: float | str) -> str:
        return rate if isinstance(rate, str) else f"{rate:,.0f}"

    names = generation["fixed_length"]
    return [[f"`{n}`", shown(names[n]), shown(generation["stop_tokens"][n])] for n in names]


def tables(report: dict[str, Any]) -> list[str]:
    """All tables, with the device they were measured on."""
    speed_heads = ("shape", "training, tokens/s", "of the peak", "scoring, tokens/s", "of the peak", "two-pass / ours")
    speed_heads += ("naive / ours", "plain layers / ours", "peak memory", "of the estimate", "compiled in")
    peers = report["head_peers"]
    peer_rows = [
        [
            f"`{name}`",
            f"{found['ms']:.1f}",
            f"{found['ms'] / peers['ours']['ms']:.2f}",
            f"{found['peak_bytes'] / GIB:.2f}",
        ]
        for name, found in peers.items()
    ]
    peak = report["bf16_matmul_peak"] / 1e12
    return [
        f"{report['device']}, torch {report['torch']}, bf16 matmul peak {peak:.0f} TFLOP/s.",
        "",
        *table(speed_heads, speed_rows(report["speed"])),
        "",
        *table(("cross entropy over the head", "ms", "/ ours", "peak, GiB"), peer_rows),
        "",
        *table(("part of the head, one full tile", "ms"), [[n, f"{v:.2f}"] for n, v in report["head_ms"].items()]),
        "",
        *table(("generation, tokens/s", "one length", "rows that stop"), generation_rows(report["generation"])),
        "",
        f"The demo's greedy accuracy: SFT {report['demo']['sft']:.3f}, distilled {report['demo']['distilled']:.3f}.",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    print("\n".join(tables(json.loads(parser.parse_args().report.read_text(encoding="utf-8")))))
