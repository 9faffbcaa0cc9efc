"""The dashboard's page as it is sent: sealed, small, its library as published, and its colours readable by everyone."""

import hashlib
import re
from importlib.resources import files

import pytest

from opd_mcp.server.page.assembly import LIBRARY, SCRIPTS, STYLES, dashboard_html, page_file

FOLDER = files("opd_mcp.server.page")
OWN = ("page.html", "style.css", *SCRIPTS)
MAX_BYTES = 128 << 10
"""What a host of MCP Apps is handed for each frame."""
TEXT = 4.5
GRAPHICS = 3.0
"""Contrast ratios of WCAG 2.2, level AA: of text (1.4.3), and of curves, bars and the edges of controls (1.4.11)."""
GROUNDS = ("page", "card")
INKS = ("ink", "soft", "good", "bad", "wait", "accent")
LINES = ("edge", "good", "bad", "accent", *(f"run{number}" for number in range(8)))
TINTS = [f"{sign}{level}" for sign in ("plus", "minus") for level in (1, 2, 3)]


def test_every_file_is_in_the_page_and_every_script_is_named():
    page = dashboard_html()
    for name in (*STYLES, LIBRARY, *SCRIPTS):
        assert page_file(name) in page
    kept = {entry.name for entry in FOLDER.iterdir() if entry.name.endswith((".js", ".css", ".html"))}
    assert kept == set(OWN)
    assert len(page.encode()) <= MAX_BYTES
    assert page.count("<script>") == page.count("</script>") == 2


def test_it_loads_nothing_and_writes_no_markup():
    for name in OWN:
        text = page_file(name)
        assert not re.findall(r"(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text), name
    library = page_file(LIBRARY)
    assert re.findall(r"https?://[^\s)]+", library) == ["https://github.com/leeoniya/uPlot"]
    assert not re.findall(r"innerHTML|document\.write|\beval\(|new Function|XMLHttpRequest|fetch\(", library)


def test_the_library_is_as_published_with_its_licence():
    sums = dict(line.split()[::-1] for line in page_file("vendor/SHA256SUMS").splitlines())
    found = {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in (FOLDER / "vendor").iterdir()}
    assert found.pop("SHA256SUMS")
    assert found == sums
    assert sums["uPlot.iife.min.js"] == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert "MIT" in page_file("vendor/LICENSE")


def theme_colors(selector: str) -> dict[str, tuple[int, ...]]:
    """The colours by name that the style sheet gives a theme, as red, green and blue."""
    block = page_file("style.css").split(f"{selector} {{")[1].split("}")[0]
    return {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--(\w+): #([0-9a-f]{6})", block)}


def luminance(color: tuple[int, ...]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The contrast ratio of two colours, from 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'])
def test_text_and_graphics_stand_out_in_both_themes(selector):
    colors = theme_colors(selector)
    pairs = [(ink, ground, TEXT) for ink in INKS for ground in GROUNDS]
    pairs += [("ink", tint, TEXT) for tint in TINTS]
    pairs += [(line, "card", GRAPHICS) for line in LINES]
    pairs += [(fill, "track", GRAPHICS) for fill in ("run0", "run7", "good", "bad", "accent")]
    found = {(one, other): contrast(colors[one], colors[other]) / least for one, other, least in pairs}
    poor = {pair: share for pair, share in found.items() if share < 1}
    assert not poor


def test_black_on_white_has_the_contrast_that_the_standard_says():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_no_text_is_smaller_than_11_pixels():
    said = sized("style.css") + sized("charts.js")
    sizes = [float(size) for size in re.findall(r"(\d+(?:\.\d+)?)px", said)]
    assert len(sizes) > 10
    assert min(sizes) >= 11


def sized(name: str) -> str:
    """The parts of a file that say how large text is."""
    return " ".join(re.findall(r"font(?:-size)?: [^;]+;|FONT = \"[^\"]+\"", page_file(name)))
