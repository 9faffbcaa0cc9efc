"""Attempts: taking a run's lock begins one, and what is known of the process that makes it lies beside the journal."""

import shutil

from opd_mcp.store.journal import JournalWriter, next_attempt
from opd_mcp.store.runs import CHECKPOINTS, JOURNAL_FILE, RunLock, set_reserve


def begin_attempt(lock: RunLock) -> int:
    """Queue the run under the next attempt number, durably, and answer it; earlier attempts write nothing from now on.

    For whoever has just acquired the lock; a process that it is passed on to takes up the attempt.
    """
    journal = lock.directory / JOURNAL_FILE
    set_reserve(lock.directory)
    with JournalWriter(journal, next_attempt(journal), lock.holds) as writer:
        writer.append("state", {"state": "queued"})
        # An earlier attempt that was suspended between its last look and its rename has nothing to rename any more.
        for building in (lock.directory / CHECKPOINTS).glob("*/.building-*"):
            shutil.rmtree(building, ignore_errors=True)
        return writer.attempt


def taken_up(lock: RunLock) -> JournalWriter:
    """The journal of the attempt that was begun by the process that passed the lock on."""
    journal = lock.directory / JOURNAL_FILE
    return JournalWriter(journal, max(next_attempt(journal) - 1, 1), lock.holds)
