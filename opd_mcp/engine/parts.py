"""Parts of a stage's work that several processes compute: whoever claims a part computes it, one puts all together.

    job-4f1c…/job.json             what is computed
              rows.safetensors     of which rows
              00007.claim          flocked by the process that is at part 7: free again when that process ends
              00007.safetensors    what it found

A part is a batch of a generation or some micro-batches of a scoring. Its shapes and its random stream do not depend on
who computes it, so results are the same to the bit for any number of processes. Imports no torch.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from opd_mcp.engine.context import Context, Helpers, require_going
from opd_mcp.identity.files import write_atomic
from opd_mcp.identity.models import ModelFacts
from opd_mcp.schemas.base import Schema
from opd_mcp.schemas.identity import BaseForm

JOB_FILE, ROWS_FILE = "job.json", "rows.safetensors"
POLL_SECONDS = 0.02
# A process that waits gives the others so many times what its own longest part took, and their patience besides.
SLOWER = 4

Arrays = Mapping[str, NDArray[Any]]


class Job(Schema):
    """What the parts of a job compute: with which model, held how, and with which settings of `kind`."""

    kind: Literal["draw", "score"]
    model: Path
    form: BaseForm
    parts: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, kind: Literal["draw", "score"], facts: ModelFacts, parts: int, **settings: Any) -> "Job":
        """A job for the model that these facts describe."""
        form: BaseForm = "plain" if facts.identity.quantization is None else "nf4"
        return cls(kind=kind, model=facts.path, form=form, parts=parts, settings=settings)


@dataclass(frozen=True)
class Shares:
    """The parts of a work that several processes compute at the same time, and then have all of.

    `number` of `size` is this process; `exchanged` gives every process the arrays of each.
    """

    number: int
    size: int
    exchanged: Callable[[Arrays], Sequence[Arrays]]


def computed_together(
    job: Job,
    rows: Arrays,
    compute: Callable[[int], Arrays],
    context: Context,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Arrays]:
    """What `compute` finds for each part, computed by this process and the context's helpers.

    `on_done` hears how many parts are there. The part of a helper that ends is computed by another process. Raises what
    `compute` and `on_done` raise, and RunError `run_cancelled`.
    """
    helpers = context.helpers
    assert helpers is not None, "there is somebody to compute with"

    def between(done: int, overdue: float) -> None:
        on_done(done)
        require_going(context)
        helpers.check()
        if overdue > helpers.patience:
            helpers.give_up()

    with _shared(job, rows, helpers) as folder:
        work_off(folder, job.parts, compute, between)
        return [load_file(part_file(folder, number)) for number in range(job.parts)]


def work_off(
    folder: Path,
    parts: int,
    compute: Callable[[int], Arrays],
    between: Callable[[int, float], None] = lambda done, overdue: None,
) -> None:
    """Compute every part that no other process is at, until all parts are there.

    `between` hears after each part, and while others are waited for, how many are there and by how many seconds the
    others exceed `SLOWER` times the longest part of this process; what it raises ends this. Raises FileNotFoundError
    once the folder is gone: the job is over.
    """
    left, longest, moved = list(range(parts)), 0.0, time.monotonic()
    while left:
        begun = time.monotonic()
        took = any(_took(part_file(folder, number), partial(compute, number)) for number in left)
        now = time.monotonic()
        before, left = len(left), [number for number in left if not part_file(folder, number).exists()]
        if took:
            longest = max(longest, now - begun)
        if took or len(left) < before:
            moved = now
        between(parts - len(left), now - moved - SLOWER * longest)
        if left and not took:
            folder.stat()  # raises when the job is over
            time.sleep(POLL_SECONDS)


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process is to make the file: it is not there, and no other process is at it.

    A claim lasts for the block, and ends with its process.
    """
    descriptor = os.open(file.with_suffix(".claim"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not file.exists()
    finally:
        os.close(descriptor)


def part_file(folder: Path, number: int) -> Path:
    """What was found for a part, once it is there."""
    return folder / f"{number:05d}.safetensors"


def read_job(folder: Path) -> tuple[Job, Arrays]:
    """A job and its rows."""
    return Job.from_json((folder / JOB_FILE).read_bytes()), load_file(folder / ROWS_FILE)


def share_of(items: Sequence[Any], parts: int, number: int) -> Sequence[Any]:
    """The items of a part, where each has as many as the others, up to one."""
    return items[number::parts]


def _took(file: Path, compute: Callable[[], Arrays]) -> bool:
    if file.exists():
        return False
    with claimed(file) as mine:
        if mine:
            write_atomic(file, save(dict(compute())))
        return mine


@contextmanager
def _shared(job: Job, rows: Arrays, helpers: Helpers) -> Iterator[Path]:
    """The folder of a job that the helpers are told of; it is gone afterwards."""
    folder = helpers.folder / f"job-{secrets.token_hex(6)}"
    folder.mkdir(mode=0o700)
    write_atomic(folder / ROWS_FILE, save(dict(rows)))
    write_atomic(folder / JOB_FILE, job.to_json())
    try:
        helpers.share(folder)
        yield folder
    finally:
        # under another name nothing is added to it by a helper that is still at a part
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}")))
