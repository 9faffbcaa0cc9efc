"""The rooms of tools/: a script is in the README's table, a documented command exists, a script finds its checkout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [path for path in sorted((ROOT / "tools").rglob("*.py")) if path.name != "__init__.py"]
DOCUMENTS = [
    *(ROOT / name for name in ("Makefile", "README.md", "CHANGELOG.md", "AGENTS.md", "SECURITY.md", "tools/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
START = "sys.path.insert(0, str(Path(__file__).resolve().parents[2]))"


def names_by_room(table: str) -> set[str]:
    """`room/file.py` for every file that the table names; an empty first cell repeats the room above."""
    names, room = set(), ""
    for line in table.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else [""]
        room = first.strip("`") or room
        names |= {room + name for name in re.findall(r"`(\w+\.py)`", " ".join(cells))}
    return names


def test_the_readme_names_every_file_of_every_room() -> None:
    table = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    assert {path.relative_to(ROOT / "tools").as_posix() for path in SCRIPTS} == names_by_room(table)


def test_documented_scripts_and_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/])((?:tests/)?tools/[\w/]+\.py)", text):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"
        for target in re.findall(r"`make ([a-z][\w-]*)", text):
            assert target in targets, f"{document.name} names make {target}"


def test_a_room_has_at_most_16_files() -> None:
    for room in {path.parent for path in SCRIPTS}:
        assert len(list(room.glob("*.py"))) <= 16, room


def test_a_script_puts_its_checkout_on_the_path_before_it_imports_from_it() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text and (ours := re.search(r"^from (?:opd_mcp|tools)\b", text, re.MULTILINE)):
            assert START in text[: ours.start()], path


@pytest.mark.parametrize("script", ["docs/mcpb.py", "fuzz/readers.py"])
def test_a_script_runs_from_another_folder(tmp_path: Path, script: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
