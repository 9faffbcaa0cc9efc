"""The dashboard's page at four widths, light and dark: nothing is cut, too small or alone; what its controls do."""

import struct
import zlib
from itertools import pairwise

import pytest

from tests.clients.browser import Browser
from tests.clients.page_feed import served_page

WIDTHS = (320, 768, 1280, 1920)
ONE, SEVERAL = "lightning-student-ec6357", "lightning-student-ec6357,lightning-student-7f0c11"
READY = "document.getElementById('note')?.textContent.startsWith('updated')"
# Charts take their size from their place in the frame after it is known.
DRAWN = """[...document.querySelectorAll(".plot")].every((plot) =>
  Math.abs((plot.querySelector("canvas")?.getBoundingClientRect().width ?? 0) - plot.clientWidth) <= 1)"""
# What is wrong with the layout, as a list of words: empty when all is well.
FAULTS = """(() => {
  const found = [], name = (node) => `${node.tagName} ${node.className} ${node.textContent.slice(0, 30)}`;
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) found.push(`page is ${root.scrollWidth} wide`);
  for (const node of document.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!box.width || node.closest("canvas, svg, details:not([open]) > :not(summary)")) continue;
    const scrolls = node.closest(".scroll, .log");
    if (!scrolls && (box.right > innerWidth + 1 || box.left < -1)) found.push(`outside: ${name(node)}`);
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (own && parseFloat(style.fontSize) < 11) found.push(`small: ${name(node)}`);
    const cut = style.display !== "inline" && node.scrollWidth > node.clientWidth + 1;
    if (own && !scrolls && cut) found.push(`cut: ${name(node)}`);
  }
  const cards = [...document.querySelectorAll("main .card")].map((each) => each.getBoundingClientRect());
  const differ = (one, other) => Math.abs(one - other) > 1, [first] = cards;
  cards.forEach((box, i) => {
    if (differ(box.left, first.left) || differ(box.width, first.width)) found.push(`card ${i} stands apart`);
    if (i && differ(box.top - cards[i - 1].bottom, 14)) found.push(`another gap before card ${i}`);
  });
  for (const grid of document.querySelectorAll(".charts, .phases, .answers")) {
    const last = grid.lastElementChild?.getBoundingClientRect(), whole = grid.getBoundingClientRect();
    if (last && differ(last.right, whole.right)) found.push(`a row of ${grid.className} ends early`);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    if (differ(plot.querySelector("canvas").getBoundingClientRect().width, plot.clientWidth)) found.push("narrow plot");
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def page():
    """The address of the page with a demo's feed."""
    with served_page() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def rows_in(png: bytes) -> int:
    """How many different rows of pixels a PNG without interlacing has, at most: 1 for an empty page."""
    place, data = 8, b""
    while place < len(png):
        (size,), kind = struct.unpack(">I", png[place : place + 4]), png[place + 4 : place + 8]
        data += png[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    raw = zlib.decompress(data)
    width, height = struct.unpack(">II", png[16:24])
    row = len(raw) // height
    assert row > width
    return len({raw[start : start + row] for start in range(0, len(raw), row)})


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_at_every_width_and_theme(browser, page, width, theme, tmp_path):
    for query in (f"?run_ids={SEVERAL}", "", f"?run_ids={ONE}"):
        browser.open(page + query, width=width, theme=theme, until=READY)
        browser.wait(DRAWN)
        assert browser.value(FAULTS) == []
        assert browser.value("document.title") == "opd-mcp runs"
        assert browser.value("document.querySelectorAll('img').length") == 0
    file = tmp_path / f"page-{width}-{theme}.png"
    browser.picture(file)
    assert struct.unpack(">I", file.read_bytes()[16:20]) == (width,)
    assert rows_in(file.read_bytes()) > 100


def test_the_check_of_the_layout_sees_what_is_wrong(browser, page):
    browser.open(page, width=320, until=f"{READY} && {DRAWN}")
    browser.value("document.getElementById('costs').style.width = '400px'")
    browser.value("document.querySelector('.key').style.fontSize = '10px'")
    faults = " ".join(browser.value(FAULTS))
    for part in ("page is", "outside:", "small:", "stands apart"):
        assert part in faults


def test_it_opens_on_the_run_that_runs_and_shows_everything_of_a_finished_one(browser, page):
    browser.open(page, width=1280, until=READY)
    shown = browser.value("document.getElementById('main').innerText")
    for part in ("lightning top-k", "120 of 400 steps", "about 64 s left", "running", "distill: loss by step"):
        assert part in shown
    assert browser.value("document.querySelectorAll('#list li').length") == 11
    assert browser.value("document.querySelectorAll('#list polyline').length") == 8
    browser.value("document.querySelector('[data-run=\"lightning-student-ec6357\"]').click()")
    browser.wait("document.getElementById('main').innerText.includes('BETTER: accuracy')")
    shown = browser.value("document.getElementById('main').innerText")
    for part in ("lightning-student minus sft-student", "0.499 to 0.597", "planned 45 s", "distill.steps", "Report"):
        assert part in shown
    assert "kl_rising at step 160" in shown
    assert browser.value("document.querySelector('.chart h3').textContent").startswith("distill: reverse KL on fresh")
    assert "checkpoint at step 300" in shown
    answers = browser.value("[...document.querySelectorAll('.answer pre')].map((e) => e.textContent)")
    assert answers[:3] == ["17 + 25 = 41\n#### 41■", "17 + 25 = 42\n#### 42■", "17 + 25 = 42\n#### 42"]
    assert browser.value("document.querySelectorAll('.tokens .minus3, .tokens .plus3').length") > 0
    assert browser.value("location.search") == "?run_ids=lightning-student-ec6357"


def test_ticked_runs_are_compared_and_coloured_by_a_setting(browser, page):
    browser.open(page, width=1280, until=READY)
    browser.value("document.querySelector('[aria-label=\"Compare lightning sampled, 400 steps\"]').click()")
    browser.wait("document.querySelectorAll('.compared tbody tr').length === 2")
    assert "worse" in browser.value("document.querySelector('.compared').innerText")
    assert "0.229 to 0.315" in browser.value("document.getElementById('summary').innerText")  # an arm, over its seeds
    chart = '[data-chart="distill.loss"] .key'
    labels = f"[...document.querySelectorAll('{chart} span:not(.dot)')].map((e) => e.textContent)"
    assert browser.value(labels)[1].startswith("lightning sampled")
    browser.value(
        "(() => { const by = document.querySelector('#summary select'); by.value = 'distill.estimator'; "
        "by.dispatchEvent(new Event('change')) })()"
    )
    assert [text.split(" ")[1] for text in browser.value(labels)] == ["sampled", "sampled"]
    dots = f"[...document.querySelectorAll('{chart} .dot')].map((e) => e.style.background)"
    assert browser.value(dots) == ["var(--run0)", "var(--run0)"]


def test_keys_move_between_runs_and_along_curves(browser, page):
    browser.open(f"{page}?run_ids={ONE}", width=1280, until=READY)
    focused = "document.activeElement.dataset.run || document.activeElement.closest('.chart')?.dataset.chart"
    browser.value("document.querySelector('#list button[tabindex=\"0\"]').focus()")
    assert browser.value(focused) == ONE
    browser.press("ArrowDown")
    assert browser.value(focused) == "lightning-student-0"
    browser.press("Home")
    browser.press("Enter")
    browser.wait("document.getElementById('main').innerText.includes('120 of 400 steps')")
    assert browser.value(focused) == "lightning-student-7f0c11"  # it stays where it was
    browser.value("document.querySelector('[data-chart=\"distill.loss\"] .plot').focus()")
    outline = browser.value("getComputedStyle(document.activeElement).outlineStyle")
    key = "document.querySelector('[data-chart=\"distill.loss\"] .key').textContent"
    assert "at step 400" in browser.value(key)
    browser.press("Home")
    browser.wait(f"{key}.includes('at step 4') && !{key}.includes('at step 400')")
    browser.press("ArrowRight")
    browser.wait(f"{key}.includes('at step 8')")
    span = "(() => { const { min, max } = charts.get('distill.loss').plot.scales.x; return max - min })()"
    whole = browser.value(span)
    browser.press("+")
    browser.wait(f"{span} < {whole} * 0.6")
    browser.press("Escape")
    browser.wait(f"{span} === {whole}")
    assert outline == "solid"


def test_curves_are_smoothed_and_drawn_on_a_log_scale(browser, page):
    browser.open(f"{page}?run_ids={ONE}", width=1280, until=READY)
    plot = "charts.get('distill.loss').plot"
    raw = browser.value(f"{plot}.data[1]")
    browser.value(
        "(() => { const by = document.querySelector('#tools input[type=range]'); by.value = 0.9; "
        "by.dispatchEvent(new Event('input')) })()"
    )
    smooth = browser.value(f"{plot}.data[1]")
    assert browser.value(f"{plot}.data[2]") == raw  # the raw values stay, faint
    assert smooth[0] == raw[0]
    roughness = [sum(abs(b - a) for a, b in pairwise(values)) for values in (raw, smooth)]
    assert roughness[1] < roughness[0] / 2
    browser.value("document.querySelector('#tools input[type=checkbox]').click()")
    assert browser.value(f"{plot}.scales.y.distr") == 3
    assert browser.value(f"{plot}.data[1].every((value) => value === null || value > 0)") is True
