"""`report.html`: a report as one page that opens anywhere, with figures drawn as SVG by the functions here.

The page has no script, loads nothing, and forbids both to itself. All text comes from models, data and paths, so every
word of it is escaped. The same report gives the same bytes.
"""

import html
import math
from collections.abc import Iterable, Sequence

from opd_mcp.schemas.reports import BenchmarkReport, Comparison, Curve, Estimate95, ModelScore, ShownAnswers
from opd_mcp.schemas.texts import duration, escaped, line_end, shortened

NAME_CHARACTERS = 60
MESSAGE_CHARACTERS = 1_200
MAX_MODELS, MAX_CURVES, MAX_NOTES = 24, 12, 40
WIDTH, BAR_ROW = 640, 42
CHART_WIDTH, CHART_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 56, 12, 12, 28
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1d1b; --soft: #5f5e5a; --line: #e4e3df;
  --bar: #2a6fdb; --plan: #b9b7b0; --good: #1a7f4b; --bad: #c0342b; --mark: #1d1d1b; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --card: #222221; --ink: #edece8; --soft: #a5a39c;
  --line: #383734; --bar: #6aa5ff; --plan: #5d5b55; --good: #55c68a; --bad: #f0766c; --mark: #edece8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; padding: 16px; }
main { max-width: 1000px; margin: 0 auto; display: grid; gap: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  min-width: 0; }
h1 { font-size: 15px; margin: 0 0 6px; color: var(--soft); }
h2 { font-size: 15px; margin: 0 0 8px; }
h3 { font-size: 13px; margin: 12px 0 4px; color: var(--soft); }
p { margin: 6px 0; overflow-wrap: anywhere; }
.sentence { font-size: 18px; }
.judgement { font-weight: 700; text-transform: uppercase; }
.better .judgement { color: var(--good); } .worse .judgement { color: var(--bad); }
.better { border-left: 6px solid var(--good); } .worse { border-left: 6px solid var(--bad); }
.no_difference, .unknown { border-left: 6px solid var(--plan); }
.bad { border-left: 6px solid var(--bad); } .bad .judgement { color: var(--bad); }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0 0 6px; min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.bars svg { max-width: 760px; overflow: visible; }
@media (max-width: 560px) { .bars svg text { font-size: 24px; } .chart svg text { font-size: 18px; } }
svg .soft { fill: var(--soft); }
.grid { stroke: var(--line); } .zero { stroke: var(--soft); stroke-dasharray: 3 3; } .mark { stroke: var(--mark); }
.bar { fill: var(--bar); } .plan { fill: var(--plan); } .gain { fill: var(--good); } .loss { fill: var(--bad); }
.curve { fill: none; stroke: var(--bar); stroke-width: 2; stroke-linejoin: round; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
.right { color: var(--good); } .wrong { color: var(--bad); }
"""


def report_page(report: BenchmarkReport) -> str:
    """The page: verdict, gain, table, curves, cost, samples, notes."""
    title = f"opd-mcp report: {report.run or report.models[0].name}"
    body = [
        f"<p>{_text(report.run, 2 * NAME_CHARACTERS)}</p>" if report.run else "",
        _verdict(report),
        _gain(report),
        _table(report),
        _curves(report.curves[:MAX_CURVES]),
        _costs(report),
        _samples(report.samples),
        _notes(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: object, characters: int = MESSAGE_CHARACTERS) -> str:
    """A text as markup that shows just that text."""
    return html.escape(escaped(shortened(str(value), characters), keep="\n"))


def _name(value: str) -> str:
    return _text(value if len(value) <= NAME_CHARACTERS else f"{value[: NAME_CHARACTERS - 1]}…")


def _section(heading: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" if content else ""


def _verdict(report: BenchmarkReport) -> str:
    facts = (
        f"{report.prompts} prompts, {report.prompts_with_answer} with an answer; seed {report.seed}; "
        f"{report.hardware}; recipe {report.recipe_hash[:12]}"
    )
    if (verdict := report.verdict) is None:
        return f"<section>\n<h1>Report</h1>\n<p>{_text(facts)}</p>\n</section>"
    word = verdict.judgement.replace("_", " ")
    lines = [f'<p class="sentence"><span class="judgement">{word}</span>: {_text(verdict.sentence)}</p>']
    lines += [f"<p>Cause: {_text(verdict.cause)}</p>"] if verdict.cause else []
    lines += [f"<p>Next: {_text(verdict.next_action.why)}</p>"] if verdict.next_action.why else []
    lines += [f'<p class="soft">{_text(facts)}</p>']
    kind = f"{verdict.judgement} bad" if verdict.is_bad else verdict.judgement
    return f'<section class="{kind}">\n<h1>Verdict</h1>\n' + "\n".join(lines) + "\n</section>"


def _gain(report: BenchmarkReport) -> str:
    models = report.models[:MAX_MODELS]
    accuracies = [(model.name, model.greedy_accuracy) for model in models if model.greedy_accuracy]
    divergences = [(model.name, model.reverse_kl) for model in models if model.reverse_kl]
    return _section(
        "Gain",
        _difference_figure(report.comparisons[:MAX_MODELS], report.teacher_row),
        _bar_figure("Greedy accuracy, with 95 % intervals", accuracies, 1.0),
        _bar_figure("Reverse KL to the teacher, nats per token; lower is closer", divergences, None),
    )


def _bar_figure(caption: str, rows: Sequence[tuple[str, Estimate95]], highest: float | None) -> str:
    """A bar with its interval for each row, from 0 on."""
    if not rows:
        return ""
    top = highest or max(estimate.high for _, estimate in rows) or 1.0
    parts = []
    for number, (name, estimate) in enumerate(rows):
        y = number * BAR_ROW
        parts += [
            _label(y, name, f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"),
            _rect("bar", 0.0, estimate.value / top * WIDTH, y),
            *_whisker(max(estimate.low, 0.0) / top * WIDTH, estimate.high / top * WIDTH, y),
        ]
    return _figure(caption, (WIDTH, len(rows) * BAR_ROW), parts)


def _difference_figure(comparisons: Sequence[Comparison], teacher: str | None) -> str:
    """The differences in accuracy around zero: gains green, losses red, but grey against the teacher."""
    if not comparisons:
        return ""
    differences = [comparison.accuracy_difference for comparison in comparisons]
    reach = max(max(abs(each.low), abs(each.high)) for each in differences) or 1.0

    def x_of(value: float) -> float:
        return WIDTH / 2 * (1 + value / reach)

    parts = [_line("zero", WIDTH / 2, 0, WIDTH / 2, len(comparisons) * BAR_ROW)]
    for number, (comparison, each) in enumerate(zip(comparisons, differences, strict=True)):
        y, kind = number * BAR_ROW, "gain" if each.low > 0 else "loss" if each.high < 0 else "plan"
        kind = "plan" if comparison.baseline == teacher else kind
        name = f"{comparison.candidate} − {comparison.baseline}"
        parts += [
            _label(y, name, f"{each.value:+.3f} [{each.low:+.3f}, {each.high:+.3f}]"),
            _rect(kind, min(x_of(each.value), WIDTH / 2), abs(x_of(each.value) - WIDTH / 2), y),
            *_whisker(x_of(each.low), x_of(each.high), y),
        ]
    return _figure(
        "Accuracy against the others, paired by prompt, with 95 % intervals", (WIDTH, len(comparisons) * BAR_ROW), parts
    )


def _label(y: float, name: str, figures: str) -> str:
    return (
        f'<text x="0" y="{y + 13}">{_name(name)}</text>'
        f'<text class="soft" x="{WIDTH}" y="{y + 13}" text-anchor="end">{_text(figures)}</text>'
    )


def _rect(kind: str, x: float, width: float, y: float, height: float = 12) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y + 19}" width="{max(width, 1):.1f}" height="{height:g}" rx="2"/>'


def _whisker(low: float, high: float, y: float) -> list[str]:
    middle = y + 25
    ends = [_line("mark", x, middle - 5, x, middle + 5) for x in (low, high)]
    return [_line("mark", low, middle, high, middle), *ends]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _figure(caption: str, size: tuple[float, float], parts: Iterable[str], kind: str = "bars") -> str:
    width, height = size
    label = _text(caption)
    return (
        f'<figure class="{kind}"><figcaption>{label}</figcaption><svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _table(report: BenchmarkReport) -> str:
    heads = ("model", "greedy accuracy", "sampled accuracy", "reverse KL", "tokens", "cut", "repeating", "entropy")
    rows = [_cells("th", heads), *(_cells("td", _figures_of(model)) for model in report.models[:MAX_MODELS])]
    rows += [_cells("td", (name, f"not measured: {why}")) for name, why in report.not_measured.items()]
    metrics = [
        _cells("td", (model.name, name, f"{metric.value:.3f}", f"n = {metric.samples}"))
        for model in report.models[:MAX_MODELS]
        for name, metric in list((model.task_metrics or {}).items())[:MAX_NOTES]
    ]
    return _section("Models", _table_of(rows), _table_of(metrics))


def _figures_of(model: ModelScore) -> list[str]:
    return [
        model.name[:NAME_CHARACTERS],
        _interval(model.greedy_accuracy),
        _interval(model.sampled_accuracy),
        _interval(model.reverse_kl),
        _number(model.mean_response_tokens, ".1f"),
        _number(model.truncated_fraction, ".0%"),
        _number(model.repeated_fraction, ".0%"),
        _number(model.entropy, ".2f"),
    ]


def _cells(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values) + "</tr>"


def _table_of(rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>' if rows else ""


def _interval(estimate: Estimate95 | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _curves(curves: Sequence[Curve]) -> str:
    figures = [curve_figure(curve) for curve in curves if len(curve.steps) > 1]
    return _section("Curves", f'<div class="charts">{"".join(figures)}</div>' if figures else "")


def curve_figure(curve: Curve) -> str:
    """A metric by step, with its axes."""
    low, high = min(curve.values), max(curve.values)
    room = (high - low) * 0.06 or abs(high) / 2 or 1.0
    low, high, first, last = low - room, high + room, curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1)

    def x_of(step: float) -> float:
        return LEFT + (CHART_WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y_of(value: float) -> float:
        return TOP + (CHART_HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for at in ticks(low, high, 5):
        parts.append(_line("grid", LEFT, y_of(at), CHART_WIDTH - RIGHT, y_of(at)))
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{y_of(at) + 4:.1f}" text-anchor="end">{at:.4g}</text>')
    for at in ticks(first, last, 5):
        if at == int(at):
            where = f'x="{x_of(at):.1f}" y="{CHART_HEIGHT - 8}"'
            parts.append(f'<text class="soft" {where} text-anchor="middle">{at:g}</text>')
    points = " ".join(
        f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True)
    )
    parts.append(f'<polyline class="curve" points="{points}"/>')
    caption = (
        f"{curve.key.replace('_', ' ').replace('.', ': ')} by step, {curve.values[-1]:.4g} at step {curve.steps[-1]}"
    )
    return _figure(caption, (CHART_WIDTH, CHART_HEIGHT), parts, "chart")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within [low, high], about so many."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step)
    found = [(first + number) * step for number in range(count + 2)]
    return [0.0 if abs(at) < step / 1e6 else at for at in found if at <= high + step * 1e-9]


def _costs(report: BenchmarkReport) -> str:
    """Seconds by stage, next to what the plan expected."""
    rows = [(cost.stage, cost.seconds, cost.reused) for cost in report.costs]
    if not rows:
        return ""
    measuring = sum(model.seconds for model in report.models)
    rows.append(("benchmark", measuring, False))
    longest = max([*(seconds for _, seconds, _ in rows), *report.planned_seconds.values()]) or 1.0
    parts = []
    for number, (stage, seconds, reused) in enumerate(rows):
        y, planned = number * BAR_ROW, report.planned_seconds.get(stage)
        said = [f"{duration(seconds)}{', reused' if reused else ''}"]
        said += [f"planned {duration(planned)}"] if planned is not None else []
        parts += [_label(y, stage.replace("_", " "), ", ".join(said))]
        parts += [_rect("plan" if reused else "bar", 0.0, seconds / longest * WIDTH, y, 8)]
        parts += [_rect("plan", 0.0, planned / longest * WIDTH, y + 10, 5)] if planned is not None else []
    caption = "Seconds by stage; the grey bar below is the plan's estimate"
    return _section("Cost", _figure(caption, (WIDTH, len(rows) * BAR_ROW), parts))


def _samples(samples: Sequence[ShownAnswers]) -> str:
    parts = []
    for sample in samples:
        answer = f" (expected: {_text(sample.answer)})" if sample.answer is not None else ""
        rows = "".join(
            f"<tr><th>{_name(name)}{_mark(sample.right.get(name))}</th><td><pre>{_said(said)}</pre></td></tr>"
            for name, said in sample.responses.items()
        )
        parts.append(f'<h3>{_text(sample.prompt)}{answer}</h3>\n<div class="scroll"><table>{rows}</table></div>')
    return _section("Samples", *parts)


def _said(response: str) -> str:
    return _text(response if response.strip() else line_end(response, 0))


def _mark(right: bool | None) -> str:
    if right is None:
        return ""
    return ' <span class="right">✓ right</span>' if right else ' <span class="wrong">✗ wrong</span>'


def _notes(report: BenchmarkReport) -> str:
    """Alerts, notes, and how the numbers were obtained."""
    alerts = [f"{alert.time} {alert.code}: {alert.message}" for alert in report.alerts[-MAX_NOTES:]]
    bases = {score.basis: None for model in report.models for score in _estimates(model)}
    graded = [f"Answers graded by {report.grader}: {report.grader_reason}."] if report.grader else []
    adapters = [made.text(name) for name, made in report.adapters.items()]
    texts = [*alerts, *report.warnings[:MAX_NOTES], *graded, *adapters, *bases]
    return _section("Alerts and notes", *(f"<p>{_text(text)}</p>" for text in texts))


def _estimates(model: ModelScore) -> list[Estimate95]:
    found = (model.greedy_accuracy, model.sampled_accuracy, model.reverse_kl)
    return [estimate for estimate in found if estimate is not None]
