"""The tool table of the README comes from the registered tools, and a stale one is noticed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMPTY = "# Title\n\n<!-- tools:start -->\n<!-- tools:end -->\n\nThe rest.\n"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "readme_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_table_is_written_between_the_markers_and_then_checks(tmp_path):
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
    assert text.startswith("# Title")
    assert text.endswith("The rest.\n")
    assert run_tool("--check", str(readme)).returncode == 0


def test_a_file_without_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert run_tool(str(readme)).returncode != 0
    assert readme.read_text() == "# Title\n"


def test_the_readme_is_up_to_date():
    done = run_tool("--check")
    assert done.returncode == 0, done.stderr
