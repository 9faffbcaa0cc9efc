"""What a Python process opens and lists, written down from its start: the fuzzers put this folder on PYTHONPATH.

`site` imports a module of this name before anything else runs. The folder that PYTHONOPENSAUDIT names gets one file per
process, one line per path, each once. Files that native code opens (weights, Parquet, tokenizer.json) raise no event.
"""

import os
import sys

EVENTS = frozenset({"open", "os.listdir", "os.scandir", "sqlite3.connect"})


def record(folder: str) -> None:
    """Write down every path that this process opens from now on."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    file = os.open(os.path.join(folder, f"{os.getpid()}.opens"), flags, 0o600)
    seen: set[str] = set()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        given = arguments[0] if event in EVENTS else None
        if not isinstance(given, str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(given))
        if path not in seen:
            seen.add(path)
            os.write(file, os.fsencode(path).replace(b"\n", b"?") + b"\n")

    sys.addaudithook(hook)


if "PYTHONOPENSAUDIT" in os.environ:
    record(os.environ["PYTHONOPENSAUDIT"])
