"""The figures of a report, and the texts of a sample, as a run's result shows them."""

import json
from pathlib import Path
from typing import Any

from opd_mcp.grading.verdicts import verdict_of
from opd_mcp.schemas.reports import BenchmarkReport, Estimate95, ModelScore
from opd_mcp.schemas.texts import shortened

SAMPLES_FILE = "samples.json"
# Of each example of a response without an answer; the report has more of it.
ANSWER_CHARACTERS = 60
METRICS_SHOWN = 12


def report_figures(report: BenchmarkReport) -> dict[str, Any]:
    """The verdict, scores by model and the paired differences; absent figures are left out."""
    verdict = report.verdict or verdict_of(report)
    figures: dict[str, Any] = {
        "verdict": verdict.to_dict(),
        "scores": {score.name: score_figures(score) for score in report.models},
    }
    if report.comparisons:
        figures["comparisons"] = [
            {
                "candidate": comparison.candidate,
                "baseline": comparison.baseline,
                "accuracy_difference": _interval(comparison.accuracy_difference),
            }
            for comparison in report.comparisons
        ]
    if report.teacher_row:
        figures["teacher_row"] = report.teacher_row
    if report.gap_closed:
        figures["gap_closed"] = [
            {"from": gap.baseline, "to": gap.teacher, "share": _interval(gap.share) if gap.share else gap.not_measured}
            for gap in report.gap_closed
        ]
    if report.not_measured:
        figures["not_measured"] = report.not_measured
    unread = [
        score.answers.text(score.name, ANSWER_CHARACTERS)
        for score in report.models
        if score.answers and (score.answers.without_answer or score.answers.timed_out)
    ]
    if unread:
        figures["no_answer"] = unread
    if report.teacher_responses:
        figures["teacher_responses"] = f"{report.teacher_responses.text()}."
    return figures


def score_figures(score: ModelScore) -> dict[str, Any]:
    """One model's figures, intervals as [value, low, high]."""
    lengths = {
        "mean_response_tokens": score.mean_response_tokens,
        "truncated_fraction": score.truncated_fraction,
        "eos_rate": score.eos_rate,
    }
    figures: dict[str, Any] = {name: value for name, value in lengths.items() if value is not None}
    for name, metric in list((score.task_metrics or {}).items())[:METRICS_SHOWN]:
        figures[name] = metric.value if metric.low is None else [metric.value, metric.low, metric.high]
    named = {
        "greedy_accuracy": score.greedy_accuracy,
        "sampled_accuracy": score.sampled_accuracy,
        "reverse_kl": score.reverse_kl,
    }
    figures |= {name: _interval(value) for name, value in named.items() if value is not None}
    if score.pass_at_k:
        figures["pass_at_k"] = score.pass_at_k
    return figures


def sampled(output: Path) -> dict[str, Any]:
    """The result of a sample: each response cut to size, and the path of the file with the whole texts."""
    file = output / SAMPLES_FILE
    samples = [
        {**sample, "prompt": shortened(sample["prompt"], 160), "response": shortened(sample["response"], 700)}
        for sample in json.loads(file.read_bytes())
    ]
    return {"samples": samples, "artifacts": {}, "paths": {"samples": str(file)}}


def rounded(value: Any, digits: int = 6) -> Any:
    """A JSON-ready value with numbers cut to this many significant digits; the files keep all digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value


def _interval(value: Estimate95) -> list[float]:
    return [value.value, value.low, value.high]
