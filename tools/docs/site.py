"""The documents as a site: links checked, staged, and built by mkdocs-material without a warning.

Run: `make docs`, or `python tools/docs/site.py [--check] [OUTPUT]` (default: site/). `--check` only checks the links. A
link to a file of the repository that is no page of the site must exist, and is shown as its name. mkdocs checks what
leads to another page or to a heading, and its warnings are errors.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

CONFIG = ROOT / "docs" / "mkdocs.yml"
# Pages that are not in docs/, by what they are called on the site.
OTHER_PAGES = {"README.md": "index.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
OTHER_PAGES |= {"AGENTS.md": "agents.md", "examples/README.md": "examples.md"}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~)")


@dataclass
class Pages:
    """The pages of the site, by their place in the repository; `problems` are links that lead nowhere."""

    root: Path = ROOT
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = {path.relative_to(self.root): path.relative_to(self.root / "docs") for path in self._own()}
        others = {Path(name): Path(place) for name, place in OTHER_PAGES.items() if (self.root / name).is_file()}
        self.places: dict[Path, Path] = own | others

    def _own(self) -> Iterator[Path]:
        files = sorted((self.root / "docs").rglob("*"))
        return (path for path in files if path.suffix in (".md", *PICTURES))

    def staged(self, folder: Path) -> None:
        """Write every page below the folder, with links as the site has them."""
        for source, place in self.places.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix in PICTURES:
                shutil.copyfile(self.root / source, target)
            else:
                target.write_text(self.text(source), encoding="utf-8")

    def text(self, source: Path) -> str:
        """A page with its links as the site has them; code stays as it is."""
        lines, fenced = [], False
        for number, line in enumerate((self.root / source).read_text(encoding="utf-8").splitlines(), start=1):
            if FENCE.match(line.strip()):
                fenced = not fenced
            lines.append(line if fenced else LINK.sub(lambda found, n=number: self._link(found, source, n), line))
        return "\n".join(lines) + "\n"

    def _link(self, found: re.Match[str], source: Path, number: int) -> str:
        picture, text, target = found.groups()
        path, mark, heading = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        there = Path(os.path.normpath(source.parent / path))
        if not (self.root / there).exists():
            self.problems.append(f"{source}:{number}: {target} leads nowhere")
            return found[0]
        page = there / "README.md" if there / "README.md" in self.places else there
        if page not in self.places:
            return f"![{text}]({target})" if picture else text
        way = os.path.relpath(self.places[page], self.places[source].parent)
        return f"{picture}[{text}]({way}{mark}{heading})"


def built(output: Path) -> list[str]:
    """The problems of the links, and then mkdocs' own; none where the site was built."""
    pages = Pages()
    with tempfile.TemporaryDirectory() as folder:
        pages.staged(Path(folder))
        if pages.problems:
            return pages.problems
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(CONFIG)]
        command += ["--site-dir", str(output.resolve())]
        environment = os.environ | {"OPD_SITE_PAGES": folder, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [done.stdout, done.stderr]


def main() -> int:
    """The command line's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "site")
    arguments = parser.parse_args()
    if arguments.check:
        pages = Pages()
        for source in pages.places:
            if source.suffix == ".md":
                pages.text(source)
        problems = pages.problems
    else:
        problems = built(arguments.output)
    print("\n".join(problems) or f"{len(Pages().places)} pages", file=sys.stderr if problems else sys.stdout)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
