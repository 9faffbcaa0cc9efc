"""Which files the processes of a fuzzed server open outside of what they may read; `hook/` writes them down."""

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).resolve().parent / "hook"
# What Python, its libraries and the C library read of any machine, and nothing that a caller could want.
SYSTEM = (
    *("/proc", "/sys", "/dev", "/usr/lib", "/usr/lib64", "/usr/share", "/usr/local/lib", "/lib", "/lib64"),
    *("/etc/ssl", "/etc/mime.types", "/etc/localtime", "/etc/timezone", "/etc/os-release", "/etc/nsswitch.conf"),
    *("/etc/hosts", "/etc/resolv.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/apache2/mime.types", "/etc/httpd"),
)


class OpensAudit:
    """What the processes that are started with `environment` open; `folder` must be empty and is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def environment(self) -> dict[str, str]:
        """The variables that switch the record on, in the server and, as workers inherit PYTHON…, in its workers."""
        path = os.pathsep.join(filter(None, (str(HOOK), str(ROOT), os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": path, "PYTHONOPENSAUDIT": str(self.folder)}

    def processes(self) -> int:
        """How many processes have been recorded."""
        return len(list(self.folder.glob("*.opens")))

    def outside(self, allowed: Iterable[Path]) -> list[str]:
        """The paths, links resolved, that are neither below the allowed folders nor of Python and the system."""
        installed = map(
            Path, (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), ROOT, *filter(None, sys.path))
        )
        fine = {Path(os.path.realpath(path)) for path in (*allowed, *installed, *map(Path, SYSTEM), self.folder)}
        found = set()
        for file in self.folder.glob("*.opens"):
            for line in file.read_bytes().splitlines():
                real = Path(os.path.realpath(os.fsdecode(line)))
                # Python looks into the folders above a package and for optional files; asking tells nobody anything.
                if not fine & {real, *real.parents} and os.path.exists(real):
                    found.add(str(real))
        return sorted(found)
