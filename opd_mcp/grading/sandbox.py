"""A script: runs a Python program in namespaces of its own, without network, with every file read-only, under limits.

    python -I sandbox.py MEMORY_BYTES CPU_SECONDS OUTPUT_BYTES [PROGRAM_FILE]

Without a program it only tries whether this machine can do that: exit status 0, or 3 with the reason on stderr. It
protects against what a language model writes by mistake, not against an attacker: the program can read what the user
can read, though it can send it nowhere. Standard library only, since it runs in isolated mode.
"""

import ctypes
import os
import resource
import signal
import sys

NOT_POSSIBLE = 3
PROCESSES = 64
OPEN_FILES = 64
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_FDCWD, _AT_RECURSIVE, _READ_ONLY, _PRIVATE = -100, 0x8000, 1, 1 << 18
_DIE_WITH_PARENT = 1


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


def isolate() -> None:
    """Leave the network, the other processes and the writable file system behind; raises OSError where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)

    def require(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    require(libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS), "no new namespaces")
    wanted = _MountAttributes(set=_READ_ONLY, propagation=_PRIVATE)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    result = libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(wanted), size)
    require(result, "no read-only file system")


def limit(memory_bytes: int, cpu_seconds: int, output_bytes: int) -> None:
    """Bounds on memory, processor time, output, open files and processes; no core dumps."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def main() -> int:
    """The program's exit status; 3 where this machine cannot isolate it."""
    memory, cpu, output = (int(argument) for argument in sys.argv[1:4])
    try:
        isolate()
    except (OSError, AttributeError) as error:
        print(error, file=sys.stderr)
        return NOT_POSSIBLE
    program = sys.argv[4:]
    if not program:
        return 0
    # The first process of the new process namespace: when it ends, the kernel ends all that it started.
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        limit(memory, cpu, output)
        os.execv(sys.executable, [sys.executable, "-I", "-B", *program])
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    os._exit(main())
