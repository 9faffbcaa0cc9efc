"""A run in words: its status, the lists of runs, and its result; programs read the structured answer."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opd_mcp.schemas.answers import SweepStarted
from opd_mcp.schemas.next_action import CallText, NextAction, advice_text
from opd_mcp.schemas.runs import ACTIVE_STATES, Failure, Progress, RunList, RunSnapshot, RunStatus
from opd_mcp.schemas.texts import byte_size, duration, shortened, shortened_bytes
from opd_mcp.server.protocol.json_schema import known

UNCHANGED_BYTES = 240
LIST_CHARACTERS = 6_000
NOTES_CHARACTERS = 300
NAME_BYTES = 40
SETTINGS_CHARACTERS = 120
EVIDENCE = ("teacher_row", "gap_closed", "not_measured", "no_answer", "teacher_responses")
"""Parts of a result that have lines of their own, besides scores and comparisons."""


def cancel_text(snapshot: RunSnapshot, call_text: CallText = NextAction.call_text) -> str:
    """That the request is recorded, and the run as it still is."""
    return "cancel requested; the run stops at its next step\n" + snapshot_text(snapshot, call_text)


def snapshot_text(snapshot: RunSnapshot, call_text: CallText = NextAction.call_text) -> str:
    """One line on the run, and what to do next."""
    state = judged_state(snapshot.state, snapshot.result)
    line = facts(f"run_id: {snapshot.run_id}", snapshot.kind, state, snapshot.phase, snapshot.progress)
    if snapshot.reused:
        line += "; reused: it was active already"
    lines = [line, *([f"name: {snapshot.name}"] if snapshot.name else []), *([snapshot.note] if snapshot.note else [])]
    if snapshot.cache_id:
        lines.append(f"cache_id: {snapshot.cache_id}")
    return "\n".join([*lines, next_line(snapshot.next_action, call_text)])


def sweep_text(sweep: SweepStarted, call_text: CallText = NextAction.call_text) -> str:
    """A line per run with its settings, what it takes together, and what was refused."""
    lines = [f"sweep_id: {sweep.sweep_id}, {len(sweep.runs)} runs"]
    if sweep.expected_seconds:
        lines[0] += f", about {duration(sweep.expected_seconds)} one after another"
    lines += [
        facts(
            f"  {run.run_id}", run.state, "reused" if run.reused else None, compact(run.settings, SETTINGS_CHARACTERS)
        )
        for run in sweep.runs
    ]
    lines += [f"not started: {why}" for why in sweep.not_started]
    return "\n".join([*lines, next_line(sweep.next_action, call_text)])


def status_text(status: RunStatus, call_text: CallText = NextAction.call_text) -> str:
    """Everything a model needs to go on: state, progress, metrics, alerts, and the result or the error."""
    state = judged_state(status.state, status.result)
    head = facts(f"run_id: {status.run_id}", status.kind, state, status.phase, status.progress)
    times = [
        f"{len(status.phases_done)}/{status.phases_total} phases done",
        f"elapsed {duration(status.elapsed_s)}" if status.elapsed_s is not None else "",
        f"eta {duration(status.eta_s)}" if status.eta_s is not None else "",
        f"queue position {status.queue_position}" if status.queue_position is not None else "",
    ]
    lines = [head, *label_lines(status.name, status.tags, status.notes), *verdict_lines(status.result or {})]
    lines.append(", ".join(part for part in times if part))
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
        lines += _failure_lines(status.error, call_text)
    return "\n".join([*filter(None, lines), next_line(status.next_action, call_text)])


def label_lines(name: str | None, tags: Sequence[str] | None, notes: str | None) -> list[str]:
    """What people call a run, in a line each, where it is called anything."""
    named = " ".join([*([f"name: {name}"] if name else []), *(f"#{tag}" for tag in tags or ())])
    return [*filter(None, [named]), *([f"notes: {shortened(notes, NOTES_CHARACTERS)}"] if notes else [])]


def unchanged_text(status: RunStatus) -> str:
    """The answer to a repeated poll, in at most 240 bytes; it stands on its own."""
    text = facts(status.run_id[:80], status.phase, status.progress)
    if status.state not in ACTIVE_STATES:
        state = judged_state(status.state, status.result)
        return _bounded(f"{text}, {state}; unchanged since the last answer, in full again in a minute", [])
    extras = ["cancel requested, pending"] if status.cancel_requested is not None else []
    extras += [f"eta {duration(status.eta_s)}"] if status.eta_s is not None else []
    return _bounded(f"{text}; still {status.state}, do not restart", extras + _metrics(status)[:1])


def list_text(runs: RunList) -> str:
    """One line per run, as many as fit; models by the last part of their names."""
    lines = [f"{len(runs.rows)} of {runs.total} runs"]
    room = LIST_CHARACTERS
    for number, row in enumerate(runs.rows):
        models = " ← ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in (row.student, row.teacher) if part)
        tags = " ".join(f"#{tag}" for tag in row.tags or ())
        note = row.note if row.state in ACTIVE_STATES else None
        state = judged(row.state, row.note)
        line = facts(row.run_id, row.kind, state, note, row.created_at, models, row.name, tags)
        room -= len(line) + 1
        if room < 0:
            lines.append(f"… {len(runs.rows) - number} more in the structured answer; or give a smaller limit")
            break
        lines.append(line)
    lines += [f"{run_id}: its record is damaged, `opd-mcp doctor` says how" for run_id in (runs.damaged or [])[:10]]
    if runs.next_cursor:
        lines.append(f"next_cursor: {runs.next_cursor}")
    return "\n".join(lines)


def judged(state: str, judgement: str | None) -> str:
    """A state with the judgement on what came out of it, e.g. `succeeded (worse)`."""
    return f"{state} ({judgement_text(judgement)})" if judgement and state == "succeeded" else state


def runs_table(runs: RunList, width: int | None) -> str:
    """Runs as a table for people: state, name, id, when, what; a line is cut where it is wider than the terminal."""
    heads = ("STATE", "NAME", "RUN", "CREATED", "MODELS", "TAGS")
    rows = [
        (
            row.note if row.note and row.state in ACTIVE_STATES else judged(row.state, row.note),
            shortened_bytes(row.name or "", NAME_BYTES),
            row.run_id,
            row.created_at[:16].replace("T", " "),
            " ← ".join(part.rstrip("/").rsplit("/", 1)[-1] for part in (row.student, row.teacher) if part),
            " ".join(row.tags or ()),
        )
        for row in runs.rows
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)] if rows else []
    if width is not None:
        lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    lines.append(f"{len(runs.rows)} of {runs.total} runs")
    lines += [f"{run_id}: its record is damaged, `opd-mcp doctor` says how" for run_id in (runs.damaged or [])[:10]]
    lines += [f"older ones: --cursor {runs.next_cursor}"] if runs.next_cursor else []
    return "\n".join(lines)


def _metrics(status: RunStatus) -> list[str]:
    return [
        f"{name} {metric.last:.4g}" + (f" {metric.trend}" if metric.trend else "")
        for name, metric in status.metrics.items()
        if metric.last is not None and math.isfinite(metric.last)
    ]


def _failure_lines(error: Failure, call_text: CallText) -> list[str]:
    lines = [f"error [{error.code}] {error.cause}", f"fix: {advice_text(error.fix, error.call, call_text)}"]
    if error.override:
        lines.append(f"suggested overrides: {compact(error.override)}")
    return lines + [f"log: {shortened(line, 300)}" for line in error.log_tail[-15:]]


def _bounded(text: str, extras: Iterable[str]) -> str:
    """The text with as many extras as fit into 240 bytes."""
    for extra in extras:
        longer = f"{text}, {extra}"
        if len(longer.encode()) <= UNCHANGED_BYTES:
            text = longer
    return shortened_bytes(text, UNCHANGED_BYTES)


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Paths, scores with their 95 % intervals, differences, training steps and seconds per stage, then the rest."""
    result = known(dict(result))
    lines = [*_path_lines(result), *_score_lines(result), *_comparison_lines(result)]
    lines += [*_evidence_lines(result), *_training_lines(result), *_overhead_lines(result)]
    if costs := _items(result, "costs"):
        spent = ", ".join(
            f"{cost.get('stage')} reused"
            if cost.get("reused")
            else f"{cost.get('stage')} {_figure(cost.get('seconds'))}"
            for cost in costs
        )
        lines.append(f"seconds by stage: {spent}")
    shown = {"verdict", "artifacts", "paths", "scores", "comparisons", "training", "costs", "overhead", *EVIDENCE}
    if rest := {name: value for name, value in result.items() if name not in shown}:
        lines.append(compact(rest))
    return lines


def _overhead_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """An assessment: the diagnosis, live against lightning, break-even, and the speeds."""
    overhead = _mapping(result, "overhead")
    if not overhead:
        return
    assessment = _mapping(overhead, "assessment")
    yield f"DIAGNOSIS {assessment.get('judgement')}: {assessment.get('diagnosis')}"
    for method in _items(overhead, "methods"):
        whole, teacher = (duration(float(method.get(name) or 0)) for name in ("seconds", "teacher_seconds"))
        yield (
            f"{method.get('method')}: {whole}, {_figure(method.get('device_hours'))} device hours on "
            f"{method.get('devices')} device, the teacher for {teacher}, peak "
            f"{byte_size(int(method.get('peak_memory_bytes') or 0))}"
        )
    yield (
        f"lightning is cheaper from {overhead.get('break_even_steps')} steps on, or with "
        f"{overhead.get('students_per_cache')} student(s) per cache"
    )
    rates = {str(speed.get("work")): speed.get("tokens_per_second") for speed in _items(assessment, "speeds")}
    yield f"tokens per second: {_figure(rates)}; seconds of loading: {_figure(_mapping(overhead, 'start_seconds'))}"
    yield from (f"{name}: {how}" for name, how in _mapping(overhead, "basis").items())


def judged_state(state: str, result: Mapping[str, Any] | None) -> str:
    """The state with what the run came to: `succeeded` alone would say that the training worked."""
    judgement = _mapping(result or {}, "verdict").get("judgement")
    return f"{state} ({judgement_text(judgement)})" if isinstance(judgement, str) else state


def judgement_text(judgement: str) -> str:
    """A judgement next to a state."""
    return {"unknown": "verdict unknown"}.get(judgement, judgement.replace("_", " "))


def verdict_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The verdict on a run, and its cause."""
    verdict = _mapping(result, "verdict")
    if sentence := verdict.get("sentence"):
        yield f"VERDICT {judgement_text(str(verdict.get('judgement')))}: {sentence}"
    if cause := verdict.get("cause"):
        yield f"cause: {cause}"


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


def _evidence_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The share of the gap closed, rows that are absent, answers that could not be read, the teacher's own answers."""
    for gap in _items(result, "gap_closed"):
        share = gap.get("share")
        found = f"not measured: {share}" if isinstance(share, str) else _figure(share)
        yield f"share of the gap closed from {gap.get('from')} to {gap.get('to')}: {found}"
    for name, why in _mapping(result, "not_measured").items():
        yield f"not measured: {name}: {why}"
    unread = result.get("no_answer")
    yield from (str(sentence) for sentence in unread) if isinstance(unread, list) else ()
    if graded := result.get("teacher_responses"):
        yield f"before the SFT: {graded}"


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


JSON_CHARACTERS = 3_000


def next_line(action: NextAction, call_text: CallText = NextAction.call_text) -> str:
    """The next step as the last line of a text."""
    return f"next: {advice_text(action.why, action, call_text)}"


def facts(*parts: str | Progress | None) -> str:
    """The parts that are known, e.g. `run-7f3a, distill, running, 120/400 steps`."""
    return ", ".join(
        f"{part.done}/{part.total} {part.unit}" if isinstance(part, Progress) else part for part in parts if part
    )


def compact(value: Any, characters: int = JSON_CHARACTERS) -> str:
    """The value as JSON without nulls or spaces, cut to so many characters with a word on where the rest is."""
    text = json.dumps(known(value), ensure_ascii=False, separators=(",", ":"), default=str)
    return shortened(text, characters, "the structured answer has all of it")
