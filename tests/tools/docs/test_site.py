"""The documents' links: all lead somewhere, and are turned into those of the site."""

from pathlib import Path

import pytest

from tools.docs.site import Pages


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "guide").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs" / "data.md").write_text("# Data\n")
    (tmp_path / "docs" / "guide" / "README.md").write_text("[data](../data.md#rows), [guide](../guide)\n")
    (tmp_path / "SECURITY.md").write_text("[test](tests/), [page](docs/data.md), [web](https://example.org/x)\n")
    return tmp_path


def test_every_link_of_every_document_leads_somewhere():
    pages = Pages()
    for source in pages.places:
        if source.suffix == ".md":
            pages.text(source)
    assert pages.problems == []
    assert Path("docs/recipe.md") in pages.places


def test_links_become_those_of_the_site_and_what_is_no_page_becomes_its_name(root, tmp_path):
    Pages(root).staged(tmp_path / "site")
    assert (tmp_path / "site" / "security.md").read_text() == "test, [page](data.md), [web](https://example.org/x)\n"
    assert (tmp_path / "site" / "guide" / "README.md").read_text() == "[data](../data.md#rows), [guide](README.md)\n"


def test_a_link_that_leads_nowhere_is_named_with_its_line_unless_it_is_code(root):
    (root / "docs" / "data.md").write_text("# Data\n\n```\n[code](nowhere.md)\n```\n[gone](gone.md)\n")
    pages = Pages(root)
    pages.text(Path("docs/data.md"))
    assert pages.problems == ["docs/data.md:6: gone.md leads nowhere"]
