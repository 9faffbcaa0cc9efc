"""Who makes an attempt where locks cannot be trusted: one winner per attempt, and life told by heartbeats alone."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.executors import Placing, Submission
from opd_mcp.store.claims import (
    BeatWatch,
    Heart,
    RunClaim,
    begin,
    newest_attempt,
    note_ending,
    note_submission,
    placed_alive,
)
from opd_mcp.store.journal import JournalWriter, read_journal

PLACING = Placing(executor="big", kind="slurm", lease_seconds=10)
CLAIMER = """
import sys
from pathlib import Path
from opd_mcp.schemas.errors import RunError
from opd_mcp.schemas.executors import Placing
from opd_mcp.store.claims import RunClaim
print("ready", flush=True)
sys.stdin.readline()
try:
    print(RunClaim.after(Path(sys.argv[1]), 4, Placing(executor="big", kind="slurm", lease_seconds=10)).attempt)
except RunError as error:
    print(error.code)
"""


@dataclass
class Clock:
    now: float = 0.0
    watch: BeatWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = BeatWatch(self)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path):
    (tmp_path / "attempts").mkdir()
    return tmp_path


def test_of_eight_claimers_at_once_one_gets_the_attempt(run):
    command = [sys.executable, "-c", CLAIMER, str(run)]
    claimers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(8)
    ]
    for claimer in claimers:
        assert claimer.stdout.readline() == "ready\n"
    answers = [claimer.communicate("go\n")[0].strip() for claimer in claimers]
    assert sorted(answers) == ["5", *["run_locked"] * 7]
    assert newest_attempt(run) == 5


def test_a_job_that_waits_is_alive_for_as_long_as_nobody_says_it_is_gone(run):
    clock = Clock()
    RunClaim.after(run, 0, PLACING)
    note_submission(run, 1, Submission(job="7"))
    assert placed_alive(run, clock.watch)
    clock.now = 1e6
    assert placed_alive(run, clock.watch)
    note_ending(run, 1, "cancelled")
    assert not placed_alive(run, clock.watch)


def test_a_claim_whose_launcher_died_before_it_was_handed_over_dies_with_its_lease(run):
    clock = Clock()
    RunClaim.after(run, 0, PLACING)
    assert placed_alive(run, clock.watch)
    clock.now = 11
    assert not placed_alive(run, clock.watch)


def test_a_worker_lives_while_its_heart_beats_by_the_reader_s_clock(run):
    clock = Clock()
    RunClaim.after(run, 0, PLACING)
    note_submission(run, 1, Submission(job="7"))
    assert begin(run, 1)
    assert not begin(run, 1), "one process makes an attempt"
    heart = Heart(run, 1, 10, clock)
    for moment in (0, 4, 8, 12):
        clock.now = moment
        heart.renew()
        assert placed_alive(run, clock.watch)
    clock.now = 22
    assert placed_alive(run, clock.watch)
    clock.now = 22.1
    assert not placed_alive(run, clock.watch)
    assert placed_alive(run, BeatWatch(clock)), "a reader that has just come cannot know yet"


def test_a_heart_that_was_late_once_never_beats_again(run):
    clock = Clock()
    claim = RunClaim.after(run, 0, PLACING)
    claim.heart = Heart(run, 1, 10, clock)
    claim.heart.renew()
    assert claim.holds()
    clock.now = 5.1
    before = (run / "heartbeat.json").read_text()
    claim.heart.renew()
    assert (run / "heartbeat.json").read_text() == before
    clock.now = 5.0
    assert not claim.holds()


def test_the_writer_of_an_earlier_attempt_is_fenced_off_by_the_claim_alone(run):
    first = RunClaim.after(run, 0, PLACING)
    with JournalWriter(run / "journal.jsonl", first.attempt, first.holds) as journal:
        journal.append("state", {"state": "queued"})
        RunClaim.after(run, 1, PLACING)
        with pytest.raises(RunError) as error:
            journal.append("state", {"state": "running"})
    assert error.value.code == "attempt_superseded"
    assert len(read_journal(run / "journal.jsonl")) == 1


def test_a_restarted_job_makes_the_next_attempt_and_another_job_none(run):
    claim = RunClaim.after(run, 0, PLACING, ticket="mine")
    note_submission(run, 1, Submission(job="7"))
    assert RunClaim.begun_by(run, "mine", 0).attempt == claim.attempt
    for ticket, life in (("mine", 0), ("other", 3)):
        with pytest.raises(RunError) as error:
            RunClaim.begun_by(run, ticket, life)
        assert error.value.code == "run_locked"
    assert RunClaim.begun_by(run, "mine", 1).attempt == 2
    assert json.loads((run / "attempts" / "00002.job").read_text())["job"] == "7"


def test_a_claim_that_was_torn_by_a_crash_counts_and_dies_with_a_lease(run):
    clock = Clock()
    (run / "attempts" / "00003.claim").touch()
    assert newest_attempt(run) == 3
    assert placed_alive(run, clock.watch)
    clock.now = 1000
    assert not placed_alive(run, clock.watch)
    assert RunClaim.after(run, 3, PLACING).attempt == 4
