"""`opd-mcp worker` that suspends itself in the thread that writes checkpoints, where somebody wished it to.

Its first argument is a folder of wishes. A file `building`, `renaming` or `published` there stops the process with
SIGSTOP, once: while the third checkpoint is made durable, between the last look at its right to write and the rename,
or between the rename and the removal of the oldest one. No production module knows of this.
"""

import os
import re
import signal
import sys
import threading
from pathlib import Path

WISHES = Path(sys.argv[1])
KEPT = 2


def sleep_if_wished(moment: str, phase: Path) -> None:
    """Stop the whole process, if there is such a wish and enough checkpoints for one to be removed next."""
    if (WISHES / moment).exists() and len(list(phase.glob("step-*"))) >= KEPT + (moment == "published"):
        (WISHES / moment).unlink()
        # To this thread, which then does nothing more; sent to the process, it might run on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def install() -> None:
    """Put the wishes under this process's fsync and rename."""
    fsync, rename = os.fsync, os.rename

    def sleepy_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if re.search(r"/checkpoints/\w+/\.building-\w+$", str(path)):
            sleep_if_wished("building", path.parent)
        elif re.search(r"/checkpoints/\w+$", str(path)):
            sleep_if_wished("published", path)

    def sleepy_rename(source: Path, target: Path) -> None:
        if Path(target).name.startswith("step-"):
            sleep_if_wished("renaming", Path(target).parent)
        rename(source, target)

    os.fsync, os.rename = sleepy_fsync, sleepy_rename


if __name__ == "__main__":
    install()
    from opd_mcp.cli import main

    sys.argv = ["opd-mcp", "worker", *sys.argv[2:]]
    main()
