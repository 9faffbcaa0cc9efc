"""The tables of docs/tools.md come from what the server registers, and a stale one is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd_mcp.schemas.resolve import recipe_keys
from opd_mcp.server.resources import PARTS
from tools.evidence.document import README_LINE, readme_line

ROOT = Path(__file__).resolve().parents[3]
TOOLS = "<!-- tools:start -->\n<!-- tools:end -->\n"
EMPTY = f"# Title\n\n{TOOLS}\n<!-- resources:start -->\n<!-- resources:end -->\n\nThe rest.\n"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "docs" / "readme_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_tables_are_written_between_the_markers_and_then_checks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    stale = run_tool("--check", str(readme))
    assert stale.returncode == 1
    assert "out of date" in stale.stderr
    assert readme.read_text() == EMPTY

    assert run_tool(str(readme)).returncode == 0
    text = readme.read_text()
    assert "| `plan_distillation` | `student`, `teacher`, `prompts`, `sft_prompts?`" in text
    assert "| `inspect_setup` | – |" in text
    assert "| `opd://recipe-keys` | `text/markdown` | Every key that overrides may name. |" in text
    assert all(f"| `opd://runs/{{run_id}}/{part}` |" in text for part in PARTS)
    assert "| `opd://artifacts/{artifact_id}/lineage` |" in text
    assert text.startswith("# Title")
    assert text.endswith("The rest.\n")
    assert run_tool("--check", str(readme)).returncode == 0


@pytest.mark.parametrize("text", ["# Title\n", TOOLS])
def test_a_file_without_markers_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert run_tool(str(readme)).returncode != 0
    assert readme.read_text() == text


def test_the_document_is_up_to_date():
    done = run_tool("--check")
    assert done.returncode == 0, done.stderr


def test_the_pages_of_this_checkout_are_as_generated():
    assert run_tool("--check").returncode == 0
    text = (ROOT / "docs" / "recipe.md").read_text()
    assert all(f"| {key} |" in text for key in recipe_keys())
    assert not [line for line in text.splitlines() if line.startswith("| ") and line.endswith("|  |")], "a key says why"


def test_the_readme_says_what_the_evidence_shows():
    """The README's line is made from docs/evidence.json, figure by figure; without the file it says nothing."""
    readme, file = (ROOT / "README.md").read_text("utf-8"), ROOT / "docs" / "evidence.json"
    said = README_LINE.search(readme)[0].removeprefix("<!-- evidence -->").removesuffix("<!-- /evidence -->").strip()
    assert said == (readme_line(json.loads(file.read_text("utf-8"))) if file.is_file() else "")
