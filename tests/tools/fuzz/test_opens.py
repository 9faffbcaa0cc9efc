"""What a process opens is written down, by whatever call, and what lies outside is found also behind a link."""

import os
import subprocess
import sys

from tools.fuzz.opens import OpensAudit


def test_what_lies_outside_is_found(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        for name in "abcd":
            (folder / name).write_text("x")
    (root / "link").symlink_to(outside / "a")
    audit = OpensAudit(tmp_path / "opens")
    code = (
        "import os, subprocess, sys\n"
        "open('a').close(); open('link').close(); os.open(sys.argv[1] + '/b', os.O_RDONLY)\n"
        "subprocess.run([sys.executable, '-c', 'import pathlib, sys; pathlib.Path(sys.argv[1], \"c\").read_bytes()',"
        " sys.argv[1]]); os.listdir(sys.argv[1]); os.path.exists(sys.argv[1] + '/d')\n"
    )
    environment = {**os.environ, **audit.environment()}
    subprocess.run([sys.executable, "-c", code, str(outside)], cwd=root, env=environment, check=True)
    assert audit.processes() == 2
    assert audit.outside([root]) == [str(outside), *(str(outside / name) for name in "abc")]
    assert audit.outside([root, outside]) == []
