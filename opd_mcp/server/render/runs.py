"""The short texts that a model reads; programs read the structured answer beside them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opd_mcp.planning.estimates import PROCESS_START
from opd_mcp.schemas.answers import GarbageReport
from opd_mcp.schemas.plans import Finding, MethodEstimate, Plan
from opd_mcp.schemas.runs import ACTIVE_STATES, Failure, Progress, RunList, RunSnapshot, RunStatus
from opd_mcp.schemas.setup import SetupReport
from opd_mcp.schemas.texts import byte_size, duration
from opd_mcp.server.protocol.json_schema import known
from opd_mcp.server.render.caches import measured_lines, prompts_text, rollouts_text
from opd_mcp.server.render.recipe_keys import setting_lines

UNCHANGED_BYTES = 240
LIST_CHARACTERS = 6_000


def setup_text(report: SetupReport) -> str:
    """The machine, the workspace, the active runs and the example's paths."""
    lines = [f"opd-mcp {report.version}, Python {report.python}"]
    lines += [
        f"{device.kind}: {device.name}, {byte_size(device.free_memory_bytes)} of "
        f"{byte_size(device.total_memory_bytes)} memory free, {device.slots_busy}/{device.slots} slots busy"
        for device in report.devices
    ]
    lines.append(f"workspace: {report.workspace} ({byte_size(report.free_disk_bytes)} free)")
    lines.append(f"allowed roots: {', '.join(report.allowed_roots)}")
    lines += [_line(run.run_id, run.kind, run.state, run.phase) for run in report.active_runs] or ["no active runs"]
    lines.append(f"presets: {', '.join(report.presets)}; wait_seconds ≤ {report.limits.wait_seconds}")
    lines += [f"quota: {name} = {value}" for name, value in report.quotas.to_dict().items()]
    lines += _finding_lines("PROBLEM", [report.problem] if report.problem else [])
    if report.example:
        lines.append("example task:")
        lines += [f"  {name}: {path}" for name, path in report.example.to_dict().items()]
    return _text(lines, report.next_action)


def garbage_text(report: GarbageReport) -> str:
    """What was or would be removed, a line each, with the sum and what could not be judged."""
    verb = "removed" if report.removed else "would remove"
    lines = [f"{verb} {item.kind}: {item.path} ({byte_size(item.bytes)})" for item in report.items]
    lines.append(f"{verb} {len(report.items)} in all, {byte_size(report.bytes)}")
    if report.kept:
        lines.append("builds and artifacts were kept, since what these would need is not known:")
        lines += [f"  {reason}" for reason in report.kept]
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """The plan's id, phases, costs, settings and findings."""
    lines = [f"plan_id: {plan.plan_id} ({plan.method}, preset {plan.recipe.preset})"]
    phases = [phase.name + (f" (done: {phase.satisfied_by})" if phase.satisfied_by else "") for phase in plan.phases]
    lines.append(f"phases: {' → '.join(phases)}")
    basis = f", {plan.consistency.basis}" if plan.consistency.basis else ""
    lines.append(f"teacher consistency: {plan.consistency.status}{basis}")
    lines += _plan_measures(plan)
    lines += [_estimate_line(estimate) for estimate in plan.estimates]
    lines += setting_lines(plan)
    lines += _finding_lines("BLOCKING", plan.blocking)
    lines += _finding_lines("warning", plan.warnings)
    return _text(lines, plan.next_action)


def _plan_measures(plan: Plan) -> list[str]:
    """What is known of the data before anything runs, with the cache that it was measured in."""
    verdict = plan.consistency
    lines = [f"prompts: {prompts_text(plan.hygiene)}"]
    lines += measured_lines(verdict.teacher_delta, verdict.engine_gap)
    if verdict.measured_in and plan.rollouts:
        lines.append(f"rollouts in {verdict.measured_in}, where these were measured: {rollouts_text(plan.rollouts)}")
    if verdict.not_measured:
        lines.append(f"not known: {verdict.not_measured}")
    return lines


def cancel_text(snapshot: RunSnapshot) -> str:
    """That the request is recorded, and the run as it still is."""
    return "cancel requested; the run stops at its next step\n" + snapshot_text(snapshot)


def snapshot_text(snapshot: RunSnapshot) -> str:
    """One line on the run, and what to do next."""
    line = _line(f"run_id: {snapshot.run_id}", snapshot.kind, snapshot.state, snapshot.phase, snapshot.progress)
    if snapshot.reused:
        line += "; reused: it was active already"
    lines = [line]
    if snapshot.cache_id:
        lines.append(f"cache_id: {snapshot.cache_id}")
    return _text(lines, snapshot.next_action)


def status_text(status: RunStatus) -> str:
    """Everything a model needs to go on: state, progress, metrics, alerts, and the result or the error."""
    head = _line(f"run_id: {status.run_id}", status.kind, status.state, status.phase, status.progress)
    times = [
        f"{len(status.phases_done)}/{status.phases_total} phases done",
        f"elapsed {duration(status.elapsed_s)}" if status.elapsed_s is not None else "",
        f"eta {duration(status.eta_s)}" if status.eta_s is not None else "",
        f"queue position {status.queue_position}" if status.queue_position is not None else "",
    ]
    lines = [head, ", ".join(part for part in times if part)]
    if status.waits_for is not None:
        lines.append(status.waits_for)
    if status.cancel_requested is not None:
        lines.append(f"cancel requested at {status.cancel_requested}, pending: the run stops at its next step")
    if status.result is None and (metrics := _metrics(status)):
        lines.append(f"metrics: {', '.join(metrics)}")
    lines += [f"ALERT {alert.code}: {alert.message}" for alert in status.alerts[-5:]]
    if status.result is not None:
        lines += result_lines(status.result)
    if status.error is not None:
        lines += _failure_lines(status.error)
    return _text(lines, status.next_action)


def unchanged_text(status: RunStatus) -> str:
    """The answer to a repeated poll, in at most 240 bytes; it stands on its own."""
    text = _line(status.run_id[:80], status.phase, status.progress)
    if status.state not in ACTIVE_STATES:
        return _bounded(f"{text}, {status.state}; unchanged since the last answer, in full again in a minute", [])
    extras = ["cancel requested, pending"] if status.cancel_requested is not None else []
    extras += [f"eta {duration(status.eta_s)}"] if status.eta_s is not None else []
    return _bounded(f"{text}; still {status.state}, do not restart", extras + _metrics(status)[:1])


def list_text(runs: RunList) -> str:
    """One line a run, as many as fit; models by the last part of their names."""
    lines = [f"{len(runs.rows)} of {runs.total} runs"]
    room = LIST_CHARACTERS
    for number, row in enumerate(runs.rows):
        models = " ← ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in (row.student, row.teacher) if part)
        line = _line(row.run_id, row.kind, row.state, row.created_at, models)
        room -= len(line) + 1
        if room < 0:
            lines.append(f"… {len(runs.rows) - number} more in the structured answer; or give a smaller limit")
            break
        lines.append(line)
    if runs.next_cursor:
        lines.append(f"next_cursor: {runs.next_cursor}")
    return "\n".join(lines)


def _text(lines: Iterable[str], next_action: str) -> str:
    return "\n".join([*(line for line in lines if line), f"next: {next_action}"])


def _line(*parts: str | Progress | None) -> str:
    """The parts that are known, e.g. `run-7f3a, distill, running, 120/400 steps`."""
    return ", ".join(
        f"{part.done}/{part.total} {part.unit}" if isinstance(part, Progress) else part for part in parts if part
    )


def _metrics(status: RunStatus) -> list[str]:
    return [
        f"{name} {metric.last:.4g}" + (f" {metric.trend}" if metric.trend else "")
        for name, metric in status.metrics.items()
        if metric.last is not None and math.isfinite(metric.last)
    ]


def _estimate_line(estimate: MethodEstimate) -> str:
    start = next((phase for phase in estimate.phases if phase.phase == PROCESS_START), None)
    of_it = f" (of it {duration(start.seconds)} process start, {start.basis.split(':')[0]})" if start else ""
    return (
        f"{estimate.method}: {duration(estimate.seconds)}{of_it}, {estimate.flops:.2g} FLOPs, "
        f"{byte_size(estimate.peak_memory_bytes)} memory, {byte_size(estimate.disk_bytes)} disk"
    )


def _finding_lines(word: str, findings: Iterable[Finding]) -> list[str]:
    return [f"{word} [{finding.code}] {finding.message} Fix: {finding.fix}" for finding in findings]


def _failure_lines(error: Failure) -> list[str]:
    lines = [f"error [{error.code}] {error.cause}", f"fix: {error.fix}"]
    if error.override:
        lines.append(f"suggested overrides: {compact(error.override)}")
    return lines + [f"log: {line[:300]}" for line in error.log_tail[-15:]]


def _bounded(text: str, extras: Iterable[str]) -> str:
    """The text with as many extras as fit into 240 bytes."""
    for extra in extras:
        longer = f"{text}, {extra}"
        if len(longer.encode()) <= UNCHANGED_BYTES:
            text = longer
    return text.encode()[:UNCHANGED_BYTES].decode(errors="ignore")


_MAX_CHARACTERS = 3000


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Paths, scores with their 95 % intervals, differences, training steps and seconds a stage, then the rest."""
    result = known(dict(result))
    lines = [*_path_lines(result), *_score_lines(result), *_comparison_lines(result), *_training_lines(result)]
    if costs := _items(result, "costs"):
        spent = ", ".join(
            f"{cost.get('stage')} reused"
            if cost.get("reused")
            else f"{cost.get('stage')} {_figure(cost.get('seconds'))}"
            for cost in costs
        )
        lines.append(f"seconds by stage: {spent}")
    shown = {"artifacts", "paths", "scores", "comparisons", "training", "costs"}
    if rest := {name: value for name, value in result.items() if name not in shown}:
        lines.append(compact(rest))
    return lines


def compact(value: Any) -> str:
    """The value as JSON without nulls or spaces, cut at 3000 characters with a word on where the rest is."""
    text = json.dumps(known(value), ensure_ascii=False, separators=(",", ":"), default=str)
    if len(text) <= _MAX_CHARACTERS:
        return text
    return text[:_MAX_CHARACTERS] + "… (cut; the structured answer has all of it)"


def _path_lines(result: Mapping[str, Any]) -> Iterator[str]:
    paths, artifacts = _mapping(result, "paths"), _mapping(result, "artifacts")
    for name, path in paths.items():
        # An artifact's directory is named after it.
        yield f"{name}: {path}"
    for name in artifacts.keys() - paths.keys():
        yield f"{name}: {artifacts[name]}"


def _score_lines(result: Mapping[str, Any]) -> Iterator[str]:
    scores = _mapping(result, "scores")
    for model in scores:
        figures = _mapping(scores, model)
        yield f"score of {model}: " + ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())


def _comparison_lines(result: Mapping[str, Any]) -> Iterator[str]:
    for pair in _items(result, "comparisons"):
        difference = _figure(pair.get("accuracy_difference"))
        yield f"accuracy of {pair.get('candidate')} minus {pair.get('baseline')}: {difference}"


def _training_lines(result: Mapping[str, Any]) -> Iterator[str]:
    for stage, summary in _mapping(result, "training").items():
        if not isinstance(summary, Mapping):
            continue
        final = ", ".join(f"{name} {_figure(value)}" for name, value in _mapping(summary, "final").items())
        pace = _figure(summary.get("seconds_per_step"))
        yield f"{stage}: {summary.get('steps')} steps of {pace} s; at the end {final}"


def _figure(value: Any) -> str:
    """A number with four digits; [value, low, high] as a value with its interval."""
    if isinstance(value, list) and len(value) == 3:
        return f"{_figure(value[0])} [{_figure(value[1])}, {_figure(value[2])}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_figure(part)}" for name, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _items(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = record.get(name)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
