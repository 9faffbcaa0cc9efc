"""A run's metrics as its journal holds them: series thinned out, their trend, and one line on what they say."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from opd_mcp.schemas.answers import MetricSeries, MetricsReport, RunMetrics
from opd_mcp.schemas.errors import ArgumentError, nearest
from opd_mcp.schemas.resolve import leaves
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord
from opd_mcp.schemas.texts import shortened
from opd_mcp.store.run_view import RunView, trend_of
from opd_mcp.store.series import Points, thinned
from opd_mcp.supervisor.records import computed_sections

MAX_VALUES = 1_200
"""Points of one answer, all series of all runs: about the size of 4k tokens."""
MAX_DIFFERENCES = 20
ALWAYS_READ = {"preset", "checkpoint", "inputs"}
CONVERGED_KL = 0.05
"""Nats per token: below it a student's own samples are almost what its teacher would write."""
LOSS_KEYS = ("reverse_kl_k1", "reverse_kl", "loss")


def metrics_report(runs: Sequence[tuple[RunRecord, RunView]], keys: Sequence[str], max_points: int) -> MetricsReport:
    """Series, trend and diagnosis of up to four runs, and what differs in their settings; views with full series.

    Raises ArgumentError `invalid_argument` for a key that no run has.
    """
    recorded = [view.series for _, view in runs]
    known = sorted({name for points in recorded for name in points})
    for key in keys:
        if not any(is_named(name, key) for name in known):
            raise ArgumentError(
                "invalid_argument",
                "No run has recorded this metric.",
                value=key,
                nearest=nearest(key, [*known, *{name.split(".", 1)[1] for name in known}]),
                fix=f"Use one of: {', '.join(known)}." if known else "Wait until a training phase has begun.",
            )
    chosen = [name for name in known if not keys or any(is_named(name, key) for key in keys)]
    total = sum(min(len(points[name]), max_points) for points in recorded for name in chosen if name in points)
    kept = fitting(chosen, recorded, max_points) if total > MAX_VALUES else chosen
    dropped = [f"{name}: ask for it with keys" for name in chosen if name not in kept]
    return MetricsReport(
        runs=[
            RunMetrics(
                run_id=record.run_id,
                kind=record.request.kind,
                state=view.state,
                series=[series(name, points[name], max_points) for name in kept if name in points],
                diagnosis=diagnosis(view, points),
            )
            for (record, view), points in zip(runs, recorded, strict=True)
        ],
        differences=differences([record for record, _ in runs]),
        dropped=dropped,
    )


def is_named(name: str, key: str) -> bool:
    """Whether a key means this series: `distill.loss` the one, `loss` that of every phase."""
    return key in (name, name.split(".", 1)[1])


def fitting(names: Sequence[str], recorded: Sequence[dict[str, Points]], max_points: int) -> list[str]:
    """The names whose series fit into one answer, the telling ones first."""
    ranked = sorted(names, key=lambda name: (name.split(".", 1)[1] not in LOSS_KEYS, not name.startswith("distill.")))
    kept: set[str] = set()
    room = MAX_VALUES
    for name in ranked:
        needed = sum(min(len(points[name]), max_points) for points in recorded if name in points)
        if needed <= room or not kept:
            kept.add(name)
            room -= needed
    return [name for name in names if name in kept]


def series(name: str, points: Points, max_points: int) -> MetricSeries:
    """A metric's finite points, thinned out to means of equal stretches; the last point stays what it is."""
    every, finite = points.finite()
    steps, values = thinned(every, finite, max_points)
    return MetricSeries(
        key=name,
        steps=steps,
        values=[float(f"{value:.5g}") for value in values],
        points=len(points),
        last=points.last(),
        low=min(finite, default=None),
        high=max(finite, default=None),
        trend=trend_of(finite),
    )


def diagnosis(view: RunView, points: dict[str, Points]) -> str:
    """One line: what went wrong, else where the objective goes."""
    for key, values in points.items():
        bad = values.not_finite()
        if bad and values.last() is None:
            return f"{key} stopped being finite at step {bad[0]}: lower the learning rate."
        if bad:
            return f"{key} was not finite at step {bad[0]} ({len(bad)} of {len(values)} steps); such steps are skipped."
    if view.alerts:
        alert = view.alerts[-1]
        return f"Alert {alert.code}: {shortened(alert.message, 200)}"
    name = next(objectives(points), None)
    if name is not None:
        verdict = (view.result or {}).get("verdict", {})
        return direction(name, points[name], gained=verdict.get("judgement", "better") == "better")
    return "No metrics yet." if view.state in ACTIVE_STATES else "This run recorded no training metrics."


def direction(name: str, points: Points, *, gained: bool = True) -> str:
    """Where a metric that should fall goes; `converged` only for a reverse KL near 0, of a run without a loss."""
    _, values = points.finite()
    if len(values) < 4:
        return f"{name} is {values[-1]:.4g} after {len(values)} points: too few for a trend."
    half = values[len(values) // 2 :]
    change = f"{name} went from {values[0]:.4g} to {values[-1]:.4g}"
    match trend_of(half):
        case "down":
            return f"{change} and still falls: more steps may help."
        case "up":
            return f"{change} and rises in its later half: lower the learning rate or stop earlier."
    level = math.fsum(half) / len(half)
    change += " and is level in its later half"
    if "reverse_kl" not in name:
        return f"{change}: it learns no more at these settings; whether that is enough, the report says."
    if abs(level) > CONVERGED_KL or not gained:
        why = f"{level:.3g} nats per token are left" if abs(level) > CONVERGED_KL else "the report shows no gain"
        return f"{change}, but {why}: it has stopped, not converged. Look at the learning rate and the rollouts."
    return f"{change}: converged at these settings."


def objectives(points: dict[str, Points]) -> Iterator[str]:
    """The series that say how training goes, the last phase's first."""
    for phase in ("distill", "sft"):
        yield from (f"{phase}.{key}" for key in LOSS_KEYS if f"{phase}.{key}" in points)


def differences(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Inputs and recipe keys in which the runs differ that read them; None for a run that did not."""
    if len(records) < 2:
        return {}
    flat = [dict(leaves({**settings_of(record), "inputs": inputs_of(record)})) for record in records]
    sections = [computed_sections(record.request) | ALWAYS_READ for record in records]
    found = {}
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = [settings.get(name) for settings in flat]
        read = [value for value, own in zip(values, sections, strict=True) if name.partition(".")[0] in own]
        if any(value != read[0] for value in read):
            found[name] = values
    return dict(list(found.items())[:MAX_DIFFERENCES])


def settings_of(record: RunRecord) -> dict[str, Any]:
    """The recipe without the sections of stages that the run did not compute, which hold the preset's values."""
    sections = computed_sections(record.request) | ALWAYS_READ
    return {name: section for name, section in record.request.recipe.to_dict().items() if name in sections}


def inputs_of(record: RunRecord) -> dict[str, str]:
    """What the run was given, by role, in short."""
    inputs = record.request.inputs
    roles = ("student", "teacher", "model", "prompts", "sft_prompts", "eval_prompts", "responses", "cache")
    given = {role: getattr(inputs, role) for role in roles}
    return {role: source.artifact_id or source.reference for role, source in given.items() if source is not None}
