"""The report as a page: whole, small, the same each time, and nothing in it but what was measured."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from opd_mcp.engine.evaluation.report_page import curve_figure, report_page, ticks
from opd_mcp.engine.stages.benchmark import report_markdown
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.next_action import plan_call
from opd_mcp.schemas.recipes import BenchmarkRecipe
from opd_mcp.schemas.reports import (
    BenchmarkReport,
    Comparison,
    Curve,
    Estimate95,
    ModelScore,
    ShownAnswers,
    StageCost,
    Verdict,
)
from opd_mcp.schemas.runs import Alert

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror='alert(1)'>\x1b[2J\u202e\" & https://evil.example/"
)
IDENTITY = ModelIdentity(name="m", weights="0" * 64, tokenizer="0" * 64, special_tokens="0" * 64)
VOID = {"meta", "br", "rect", "line", "polyline"}


class Reading(HTMLParser):
    """Counts tags, keeps visible text and attributes, and checks that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += "" if self.open[-1:] == ["style"] else data


def score(name: str, accuracy: float, kl: float) -> ModelScore:
    def estimate(value: float) -> Estimate95:
        return Estimate95(value=value, low=value - 0.1, high=value + 0.1, samples=50, basis=f"basis {name}")

    return ModelScore(
        name=name, identity=IDENTITY, greedy_accuracy=estimate(accuracy), reverse_kl=estimate(kl), seconds=3, tokens=9
    )


def made_up(text: str = "1+1=?", size: int = 1) -> BenchmarkReport:
    names = [f"distilled {text}" if text != "1+1=?" else "distilled", "sft", "teacher"]
    loss = Estimate95(value=-0.2, low=-0.3, high=-0.1, samples=50, basis="paired")
    sample = ShownAnswers(
        prompt=text * size, answer=text, responses=dict.fromkeys(names, text * size), right={"sft": True}
    )
    return BenchmarkReport(
        run=f"{text} (lightning-small-1a)",
        verdict=Verdict(judgement="worse", sentence=text, cause=text * size, next_action=plan_call(text)),
        recipe=BenchmarkRecipe(),
        suite=text,
        seed=0,
        prompts_sha256="0" * 64,
        prompts=50,
        prompts_with_answer=50,
        teacher_row="teacher",
        models=[score(name, 0.3 + 0.2 * number, 0.5) for number, name in enumerate(names)],
        comparisons=[
            Comparison(candidate=names[0], baseline=name, accuracy_difference=loss) for name in ("sft", "teacher")
        ],
        not_measured={text: text},
        hardware=text,
        recipe_hash="0" * 64,
        costs=[StageCost(stage="sft", seconds=20.0), StageCost(stage=text, seconds=4.0, reused=True)],
        planned_seconds={"sft": 10.0},
        alerts=[Alert(time="2026-08-01T10:00:00Z", code="collapse", message=text * size)] * 20,
        warnings=[text * size] * 9,
        curves=[Curve(key=f"distill.{text}", steps=list(range(80)), values=[1 / (step + 1) for step in range(80)])] * 9,
        samples=[sample] * 4,
    )


def test_a_loss_is_red_and_stands_first_then_figures_curves_cost_and_samples():
    page = report_page(made_up())
    words = Reading(page).words
    order = [
        "1+1=? (lightning-small-1a)",
        "Verdict",
        "worse",
        "Gain",
        "−0.200"[1:],
        "Models",
        "Curves",
        "Cost",
        "planned 10 s",
        "Samples",
        "✓ right",
    ]
    places = [words.index(part) for part in order]
    assert places == sorted(places)
    assert '<section class="worse bad">' in page
    assert page.count('class="loss"') == 1, "being below the teacher is no loss"
    assert ".worse .judgement { color: var(--bad); }" in page
    assert "prefers-color-scheme: dark" in page


def test_the_text_is_headed_by_the_run_and_counts_the_measurement_among_the_stages():
    text = report_markdown(made_up())
    assert text.startswith("# Benchmark: 1+1=? (lightning-small-1a)\n")
    assert "| benchmark | 9.0 | | |" in text


def test_the_same_report_gives_the_same_bytes():
    assert report_page(made_up()) == report_page(made_up())


def test_nothing_that_a_model_or_a_name_says_becomes_markup():
    page = report_page(made_up(HOSTILE))
    read = Reading(page)
    assert read.open == []
    assert not {"script", "img", "link", "iframe", "a", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "<script>alert(1)</script>" in read.words, "it is shown as the text that it is"
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page)


def test_every_figure_is_well_formed_and_named():
    figures = re.findall(r"<svg.*?</svg>", report_page(made_up(HOSTILE)), flags=re.DOTALL)
    assert len(figures) == 3 + 9 + 1
    for figure in figures:
        assert ElementTree.fromstring(figure).get("aria-label")


def test_a_page_stays_small_whatever_it_is_made_of():
    assert len(report_page(made_up("🦆<&" * 10, size=3_000)).encode()) < 1_000_000


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 2e-9], [-3.0, 5.0], [1e12, 2e12]])
def test_a_curve_of_any_range_has_its_line_within_the_axes(values):
    figure = curve_figure(Curve(key="sft.loss", steps=[1, 2], values=values))
    [line] = [node for node in ElementTree.fromstring(figure).iter() if node.tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert all(0 <= x <= 460 and 0 <= y <= 220 for x, y in points)


def test_ticks_are_round_and_within_the_range():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.35, 0.9, 5) == pytest.approx([0.0, 0.5])
