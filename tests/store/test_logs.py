"""A run's log, page by page."""

from pathlib import Path

import pytest

from opd_mcp.schemas.errors import ArgumentError
from opd_mcp.store.logs import log_page


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "worker.log"
    path.write_text("".join(f"line {number} {'odd' if number % 2 else 'even'}\n" for number in range(20_000)))
    return path


def numbers(page):
    return [int(line.split()[1]) for line in page.lines]


def test_the_last_lines_come_first_and_the_cursor_goes_back(log):
    page = log_page("r", log, tail=50)
    assert numbers(page) == list(range(19_950, 20_000))
    older = log_page("r", log, tail=50, cursor=page.next_cursor)
    assert numbers(older) == list(range(19_900, 19_950))


def test_every_line_is_on_exactly_one_page(log):
    seen, cursor = [], None
    while True:
        page = log_page("r", log, tail=200, cursor=cursor)
        seen = numbers(page) + seen
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == list(range(20_000))


def test_only_lines_with_a_text(log):
    page = log_page("r", log, tail=10, contains="odd")
    assert numbers(page) == list(range(19_981, 20_000, 2))


def test_a_long_line_is_cut_and_a_page_stays_small(tmp_path):
    path = tmp_path / "worker.log"
    path.write_text(("x" * 5000 + "\n") * 100)
    page = log_page("r", path, tail=200)
    assert sum(len(line) for line in page.lines) <= 7000
    assert page.next_cursor


@pytest.mark.parametrize("content", ["", "no newline at all", "\n\n\n", "a\r\nb", "ä" * 100_000])
def test_odd_logs_break_nothing(tmp_path, content):
    path = tmp_path / "worker.log"
    path.write_text(content)
    assert len(log_page("r", path, tail=50).lines) <= 4


def test_a_run_without_a_log_has_no_lines(tmp_path):
    assert log_page("r", tmp_path / "none", tail=5).lines == []


@pytest.mark.parametrize("cursor", ["x", "-1", "99999999999", "1.5", "²"])
def test_a_cursor_of_somebody_else_is_refused(log, cursor):
    with pytest.raises(ArgumentError):
        log_page("r", log, tail=5, cursor=cursor)
