"""Runs next to each other: the settings that differ, the figures of their reports, and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from pydantic import ValidationError

from opd_mcp.grading.paired import mean_over_seeds, paired_outcomes
from opd_mcp.planning.arms import ASKED, arm_of
from opd_mcp.schemas.answers import ComparedArm, ComparedRun, Interval, PairedRuns, RunComparison
from opd_mcp.schemas.errors import ArgumentError, OpdError, UnknownIdError, nearest
from opd_mcp.schemas.next_action import NextAction, next_call
from opd_mcp.schemas.reports import BenchmarkReport, Estimate95, ModelScore
from opd_mcp.schemas.requests import MAX_COMPARED
from opd_mcp.schemas.runs import ACTIVE_STATES, RunRecord
from opd_mcp.store.run_view import RunView
from opd_mcp.store.store import Store
from opd_mcp.views.metrics import differences
from opd_mcp.views.status import costs_by_stage

REPORT_FILE = "report.json"
MAX_REPORT_BYTES = 16 << 20


def runs_with_tag(store: Store, tag: str) -> list[str]:
    """The ids of the runs with a tag, newest first; raises UnknownIdError `unknown_run` where there are none."""
    rows = store.list_runs(tag=tag, limit=MAX_COMPARED).rows
    if rows:
        return [row.run_id for row in rows]
    tags = {tag for row in store.list_runs(limit=1_000).rows for tag in row.tags or ()}
    raise UnknownIdError(
        "unknown_run",
        "No run has this tag.",
        value=tag,
        nearest=nearest(tag, sorted(tags)),
        fix="Give run_ids, or a tag of the listed runs.",
        call=next_call("list_runs"),
    )


def chosen_runs(store: Store, run_ids: Sequence[str], tag: str | None) -> list[str]:
    """The runs that a comparison is of, as given, or of a tag, oldest first.

    Raises ArgumentError `invalid_argument` unless one of the two is given, UnknownIdError as `runs_with_tag`.
    """
    if bool(run_ids) == (tag is not None):
        raise ArgumentError(
            "invalid_argument",
            "A comparison is of run_ids, or of the runs with a tag.",
            fix="Give run_ids or tag, one of the two.",
            call=next_call("list_runs"),
        )
    return list(dict.fromkeys(run_ids)) if tag is None else runs_with_tag(store, tag)[::-1]


def compared(store: Store, run_ids: Sequence[str]) -> RunComparison:
    """The table of at most 32 runs, of their records and reports alone.

    Raises UnknownIdError `unknown_run`, IntegrityError `damaged_file` for a record that cannot be read.
    """
    runs = [(store.record(run_id), store.view(run_id)) for run_id in run_ids[:MAX_COMPARED]]
    reports = [report_of(store, view) for _, view in runs]
    differing = differences([record for record, _ in runs])
    rows = []
    for place, (record, view) in enumerate(runs):
        found = reports[place]
        figures = _figures(found) if isinstance(found, BenchmarkReport) else {"not_measured": found}
        seconds = sum(cost.seconds for cost in costs_by_stage(view) if not cost.reused)
        rows.append(
            ComparedRun(
                run_id=record.run_id,
                name=record.request.labels.name,
                kind=record.request.kind,
                state=view.state,
                settings={key: values[place] for key, values in differing.items() if values[place] is not None},
                seconds=round(seconds, 1) if seconds else None,
                **figures,
            )
        )
    measured = {
        row.run_id: found for row, found in zip(rows, reports, strict=True) if isinstance(found, BenchmarkReport)
    }
    runs_by_arm = [(arm_of(record.request.labels.tags), record, view) for record, view in runs]
    arms = compared_arms([(arm, record, view) for arm, record, view in runs_by_arm if arm], measured)
    best = _best(rows, measured)
    paired, notes = _paired(best.run_id, measured) if best else ([], [])
    if len(run_ids) > MAX_COMPARED:
        notes.append(f"left out: {len(run_ids) - MAX_COMPARED} runs; a comparison holds {MAX_COMPARED}")
    return RunComparison(
        settings=list(differing),
        runs=rows,
        best=best.run_id if best else None,
        paired=paired,
        arms=arms,
        notes=notes,
        basis=_basis(measured.values()),
        next_action=_next_action(rows, best, measured),
    )


def _best(rows: Sequence[ComparedRun], measured: Mapping[str, BenchmarkReport]) -> ComparedRun | None:
    """The run with the highest accuracy; one with a bad verdict only where no run has a better one."""
    with_accuracy = [row for row in rows if row.accuracy]
    sound = [row for row in with_accuracy if not _is_bad(row.run_id, measured)]
    return max(sound or with_accuracy, key=_accuracy, default=None)


def _is_bad(run_id: str, measured: Mapping[str, BenchmarkReport]) -> bool:
    verdict = measured[run_id].verdict if run_id in measured else None
    return verdict is not None and verdict.is_bad


def candidate_of(report: BenchmarkReport) -> ModelScore:
    """The model that a report is about: the first."""
    return report.models[0]


def report_of(store: Store, view: RunView) -> BenchmarkReport | str:
    """The report that a run ended with, or why there is none to read."""
    artifact_id = view.artifacts.get("benchmark")
    if artifact_id is None:
        return "no report yet" if view.state in ACTIVE_STATES else f"no report: {view.state}"
    try:
        file: Path = store.artifacts.get(artifact_id).path / REPORT_FILE
        if file.stat().st_size > MAX_REPORT_BYTES:
            return "its report is too large to compare"
        return BenchmarkReport.from_json(file.read_bytes())
    except (OpdError, OSError):
        return "its report is gone"
    except ValidationError:
        return "its report cannot be read"


def _figures(report: BenchmarkReport) -> dict[str, object]:
    score = candidate_of(report)
    against = next((pair for pair in report.comparisons if pair.candidate == score.name), None)
    return {
        "model": score.name,
        "accuracy": interval(score.greedy_accuracy),
        "sampled_accuracy": interval(score.sampled_accuracy),
        "reverse_kl": interval(score.reverse_kl),
        "baseline": against.baseline if against else None,
        "gain": interval(against.accuracy_difference) if against else None,
        "verdict": report.verdict.judgement if report.verdict else None,
    }


def interval(estimate: Estimate95 | None) -> Interval | None:
    """An estimate as value, low and high, to four digits after the point."""
    return None if estimate is None else (round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4))


def _accuracy(row: ComparedRun) -> float:
    return row.accuracy[0] if row.accuracy else 0.0


def _paired(best: str, measured: dict[str, BenchmarkReport]) -> tuple[list[PairedRuns], list[str]]:
    """The best run against each other one whose answers are to the same prompts, and how to read that."""
    own, pairs, apart = measured[best], [], []
    for run_id, report in measured.items():
        if run_id == best:
            continue
        first, second = candidate_of(own).greedy_right, candidate_of(report).greedy_right
        if first is None or second is None:
            apart.append(f"{run_id}: its report does not keep the outcome of each prompt")
        elif not _same_task(own, report):
            apart.append(f"{run_id}: measured on other prompts, or graded otherwise")
        else:
            found = paired_outcomes(first, second)
            values = interval(found)
            assert values is not None
            pairs.append(PairedRuns(candidate=best, baseline=run_id, accuracy_difference=values, prompts=found.samples))
    notes = [f"not paired with the best: {reason}" for reason in apart[:5]]
    if len(measured) > 2:
        notes.append(
            f"the best of {len(measured)} was chosen by these figures, which flatters it: measure it on other prompts "
            "before you quote it"
        )
    return pairs, notes


def compared_arms(
    runs: Sequence[tuple[str, RunRecord, RunView]], measured: Mapping[str, BenchmarkReport]
) -> list[ComparedArm]:
    """Quality and whole cost of each arm, and the asked arm minus it, paired by seed; empty for fewer than two runs."""
    by_arm: dict[str, dict[int, tuple[RunRecord, RunView]]] = {}
    for arm, record, view in runs:
        by_arm.setdefault(arm, {})[record.request.recipe.runtime.seed] = record, view
    if len(runs) < 2:
        return []
    asked = {seed: measured.get(record.run_id) for seed, (record, _) in by_arm.get(ASKED, {}).items()}
    rows = []
    for arm, seeds in by_arm.items():
        reports = {seed: measured[record.run_id] for seed, (record, _) in seeds.items() if record.run_id in measured}
        scores = [candidate_of(report) for report in reports.values()]
        pairs = [(one, reports[seed]) for seed, one in asked.items() if one is not None and seed in reports]
        gain, change = (None, None) if arm == ASKED else paired_arms([p for p in pairs if _same_task(*p)])
        rows.append(
            ComparedArm(
                arm=arm,
                runs=len(seeds),
                accuracy=_mean(score.greedy_accuracy for score in scores),
                reverse_kl=_mean(score.reverse_kl for score in scores),
                seconds=_mean_seconds(view for _, view in seeds.values()),
                gain=interval(gain),
                kl_change=interval(change),
            )
        )
    return rows


def paired_arms(
    pairs: Sequence[tuple[BenchmarkReport, BenchmarkReport]],
) -> tuple[Estimate95 | None, Estimate95 | None]:
    """The first ones' gain in accuracy and change in reverse KL over the others, paired by seed, else by prompt."""
    scores = [(candidate_of(one), candidate_of(other)) for one, other in pairs]
    gains = [
        mine.greedy_accuracy.value - others.greedy_accuracy.value
        for mine, others in scores
        if mine.greedy_accuracy and others.greedy_accuracy
    ]
    changes = [
        mine.reverse_kl.value - others.reverse_kl.value
        for mine, others in scores
        if mine.reverse_kl and others.reverse_kl
    ]
    gain = mean_over_seeds(gains)
    if len(scores) == 1 and gains and scores[0][0].greedy_right and scores[0][1].greedy_right:
        gain = paired_outcomes(scores[0][0].greedy_right, scores[0][1].greedy_right)
    return gain, mean_over_seeds(changes)


def _mean(found: Iterable[Estimate95 | None]) -> float | None:
    values = [estimate.value for estimate in found if estimate is not None]
    return round(mean(values), 4) if values else None


def _mean_seconds(views: Iterable[RunView]) -> float | None:
    """The mean of what the stages up to the student took, whoever made them; the benchmark is no part of a method."""
    whole = [sum(c.seconds for c in costs_by_stage(view) if c.stage != "benchmark") for view in views]
    return round(mean(whole), 3) if any(whole) else None


def _same_task(one: BenchmarkReport, other: BenchmarkReport) -> bool:
    def task(report: BenchmarkReport) -> tuple[object, ...]:
        return report.prompts_sha256, report.prompts, report.prompts_with_answer, report.grader

    first, second = candidate_of(one).greedy_right, candidate_of(other).greedy_right
    return task(one) == task(other) and len(first or "") == len(second or "")


def _basis(reports: Iterable[BenchmarkReport]) -> dict[str, str]:
    found: dict[str, str] = {}
    for report in reports:
        score = candidate_of(report)
        named = {"accuracy": score.greedy_accuracy, "sampled_accuracy": score.sampled_accuracy}
        named |= {"reverse_kl": score.reverse_kl}
        for name, value in named.items():
            if value is not None:
                found.setdefault(name, f"{value.samples} samples; {value.basis}")
    return found


def _next_action(
    rows: Sequence[ComparedRun], best: ComparedRun | None, measured: Mapping[str, BenchmarkReport]
) -> NextAction:
    active = next((row for row in rows if row.state in ACTIVE_STATES), None)
    if active is not None:
        why = "Some runs are still active: wait, then compare again."
        return next_call("get_run_status", why, run_id=active.run_id, wait_seconds=25)
    if best is None:
        return NextAction(why="None of these runs has a report with an accuracy; benchmark_student measures a model.")
    if _is_bad(best.run_id, measured):
        why = "None of these runs is better than what it began with: change what the verdict of the highest names."
        return next_call("get_run_status", why, run_id=best.run_id)
    return next_call(
        "benchmark_student", "Measure the best on prompts that chose nothing.", missing=["prompts"], model=best.run_id
    )
