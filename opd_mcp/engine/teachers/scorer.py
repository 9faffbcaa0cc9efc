"""The one thread behind `serve-teacher` that uses the model: what is queued together is scored together."""

import contextvars
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.teachers.local import score_sequences
from opd_mcp.engine.teachers.teacher import LocalTeacher

GATHER_SECONDS = 0.004


@dataclass(frozen=True)
class Limits:
    """What a server accepts."""

    queue: int = 256
    batch_tokens: int = 16384
    topk: int = 256
    length: int = 32768


@dataclass(frozen=True)
class Job:
    """One sequence to score from `start` on."""

    ids: list[int]
    start: int
    topk: int
    future: "Future[list[dict[str, Any]]]" = field(default_factory=Future)


class Scorer:
    """The one thread that uses the model: it takes what is queued, as far as a batch goes, and scores it at once."""

    def __init__(self, teacher: LocalTeacher, limits: Limits) -> None:
        self.teacher, self.limits = teacher, limits
        self.batches = 0
        self._jobs: queue.Queue[Job | None] = queue.Queue(limits.queue)
        # torch's compiler settings belong to a context, and a thread would begin with one of its own
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="scorer", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Whether there was room for all jobs; if not, those that were queued are cancelled."""
        for job in jobs:
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                for other in jobs:
                    other.future.cancel()
                return False
        return True

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, ended = self._gathered()
            if batch:
                self.batches += 1
                try:
                    self._score(batch)
                except Exception as error:
                    for job in batch:
                        if not job.future.done():
                            job.future.set_exception(error)
            if ended:
                return

    def _gathered(self) -> tuple[list[Job], bool]:
        first = self._jobs.get()
        batch, tokens, until = [], 0, time.monotonic() + GATHER_SECONDS
        job = first
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                batch.append(job)
                tokens += len(job.ids)
            if tokens >= self.limits.batch_tokens:
                return batch, False
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return batch, False
        return batch, True

    def _score(self, batch: list[Job]) -> None:
        sequences = build_sequences([job.ids[: job.start] for job in batch], [job.ids[job.start :] for job in batch])
        scores = score_sequences(
            self.teacher.model,
            sequences,
            topk=max(job.topk for job in batch),
            micro_batch_tokens=self.limits.batch_tokens,
            runtime=self.teacher.runtime,
            valid_vocab=self.teacher.model.facts.tokens,
        )
        for row, job in enumerate(batch):
            here = slice(*sequences.response_offsets[row : row + 2])
            best: list[tuple[list[int], list[float]]] = [([], [])] * (len(job.ids) - job.start)
            if scores.topk_ids is not None and scores.topk_logprobs is not None and job.topk:
                ids, values = scores.topk_ids[here, : job.topk].tolist(), scores.topk_logprobs[here].tolist()
                best = list(zip(ids, values, strict=True))
            own = scores.logprobs[here].tolist()
            job.future.set_result([_entry(*pair) for pair in zip(job.ids[job.start :], own, best, strict=True)])


def _entry(token: int, logprob: float, best: tuple[list[int], list[float]]) -> dict[str, Any]:
    entries = {
        str(other): {"logprob": _finite(value), "rank": rank}
        for rank, (other, value) in enumerate(zip(*best, strict=True), 1)
    }
    # the token's own number stands, whatever the k best say of it: what is trained on is never papered over
    return entries | {str(token): entries.get(str(token), {}) | {"logprob": _finite(logprob)}}


def _finite(logprob: float) -> float | None:
    # JSON has no NaN; the asker leaves out the row that holds it, not the whole build
    return logprob if math.isfinite(logprob) else None
