"""What a container leaves of the machine's memory; the plan and the engine ask here."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def container_limit() -> int | None:
    """Bytes that this process's container may use in all; None where it sets no limit."""
    return _number(_CGROUP / "memory.max")


def container_room() -> int | None:
    """Bytes that this process's container may still use; None where it sets no limit."""
    limit, used = container_limit(), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return None
    return max(limit - used + statistic(_CGROUP / "memory.stat", "inactive_file"), 0)


def statistic(path: Path, name: str) -> int:
    """The number after a name in a file of names and numbers; 0 without it."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
