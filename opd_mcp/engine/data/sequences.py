"""Prompts with their responses, flat in memory: one array per column, offsets per row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

EOS, TRUNCATED = "eos", "length"


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher sees before each of N responses: `ids` int32 [Q], `offsets` int64 [N + 1]."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def of(self, row: int) -> NDArray[np.int32]:
        """Token ids of one prompt."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Sequences:
    """N rows with P prompt tokens and T response tokens in all.

    `prompt_ids` int32 [P], `response_ids` int32 [T], offsets int64 [N + 1]; `columns` hold one value ([T]) or k values
    ([T, k]) a response token: `teacher_logprobs`, `behaviour_logprobs`, `topk_ids`, `topk_logprobs`. Where the teacher
    sees other prompts than the student, `teacher_prompts` has them; the response tokens are the same. `domains` are
    those of several teachers.
    """

    prompt_ids: NDArray[np.int32]
    prompt_offsets: NDArray[np.int64]
    response_ids: NDArray[np.int32]
    response_offsets: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    finish_reasons: Sequence[str] = ()
    prompt_row_ids: Sequence[str] = ()
    teacher_prompts: TeacherPrompts | None = None
    domains: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.response_offsets) - 1

    @classmethod
    def empty(cls) -> "Sequences":
        """No rows."""
        return build_sequences([], [])

    def prompt(self, row: int) -> NDArray[np.int32]:
        """Token ids of one prompt."""
        return self.prompt_ids[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]

    def response(self, row: int) -> NDArray[np.int32]:
        """Token ids of one response, EOS included where it was sampled."""
        return self.response_ids[self.response_offsets[row] : self.response_offsets[row + 1]]

    def column(self, name: str, row: int) -> NDArray[np.generic]:
        """One row's values of a per-token column."""
        return self.columns[name][self.response_offsets[row] : self.response_offsets[row + 1]]

    def response_lengths(self) -> NDArray[np.int64]:
        """Response tokens of each row [N]."""
        return np.diff(self.response_offsets)

    def lengths(self) -> NDArray[np.int64]:
        """Prompt plus response tokens of each row [N]."""
        return np.diff(self.prompt_offsets) + self.response_lengths()

    def with_columns(self, **columns: NDArray[np.generic]) -> "Sequences":
        """The same rows with columns added or replaced."""
        return replace(self, columns={**self.columns, **columns})

    def for_teacher(self) -> "Sequences":
        """The same responses after the prompts that the teacher sees; a token has the place that it has here."""
        seen = self.teacher_prompts
        return self if seen is None else replace(self, prompt_ids=seen.ids, prompt_offsets=seen.offsets)

    def with_prompts(self, prompts: Sequence[Sequence[int]]) -> "Sequences":
        """The same responses after other prompts; those of now are what the teacher saw."""
        ids, offsets = flatten(prompts)
        seen = TeacherPrompts(self.prompt_ids, self.prompt_offsets)
        return replace(self, prompt_ids=ids, prompt_offsets=offsets, teacher_prompts=seen)

    def beginnings(self, lengths: NDArray[np.int64]) -> "Sequences":
        """The same rows with the first `lengths` [N] tokens of their responses; why they ended is no longer known."""
        kept = np.arange(len(self.response_ids)) - np.repeat(self.response_offsets[:-1], self.response_lengths())
        mask = kept < np.repeat(lengths, self.response_lengths())
        return Sequences(
            self.prompt_ids,
            self.prompt_offsets,
            self.response_ids[mask],
            np.concatenate([[0], np.cumsum(np.minimum(lengths, self.response_lengths()))]).astype(np.int64),
            {name: values[mask] for name, values in self.columns.items()},
            (),
            self.prompt_row_ids,
            self.teacher_prompts,
            self.domains,
        )

    def take(self, rows: NDArray[np.int64]) -> "Sequences":
        """The chosen rows in their order, copied together: what a batch reads of a memory-mapped cache."""
        prompt_ids, prompt_offsets = gathered(self.prompt_ids, self.prompt_offsets, rows)
        response_ids, response_offsets = gathered(self.response_ids, self.response_offsets, rows)
        return Sequences(
            prompt_ids.astype(np.int32, copy=False),
            prompt_offsets,
            response_ids.astype(np.int32, copy=False),
            response_offsets,
            {name: gathered(values, self.response_offsets, rows)[0] for name, values in self.columns.items()},
            [self.finish_reasons[row] for row in rows.tolist()] if self.finish_reasons else (),
            [self.prompt_row_ids[row] for row in rows.tolist()] if self.prompt_row_ids else (),
            None if self.teacher_prompts is None else _taken(self.teacher_prompts, rows),
            [self.domains[row] for row in rows.tolist()] if self.domains else (),
        )

    def slice(self, start: int, stop: int) -> "Sequences":
        """Rows start … stop − 1."""
        p, r = self.prompt_offsets[start : stop + 1], self.response_offsets[start : stop + 1]
        return Sequences(
            self.prompt_ids[p[0] : p[-1]],
            p - p[0],
            self.response_ids[r[0] : r[-1]],
            r - r[0],
            {name: values[r[0] : r[-1]] for name, values in self.columns.items()},
            self.finish_reasons[start:stop],
            self.prompt_row_ids[start:stop],
            None if self.teacher_prompts is None else _taken(self.teacher_prompts, np.arange(start, stop)),
            self.domains[start:stop],
        )


def _taken(prompts: TeacherPrompts, rows: NDArray[np.int64]) -> TeacherPrompts:
    ids, offsets = gathered(prompts.ids, prompts.offsets, rows)
    return TeacherPrompts(ids.astype(np.int32, copy=False), offsets)


def gathered(
    values: NDArray[np.generic], offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """The values of the chosen rows, copied one after the other, and their offsets."""
    starts, stops = offsets[rows], offsets[rows + 1]
    parts = [values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    new_offsets = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
    return np.concatenate([values[:0], *parts]), new_offsets


def flatten(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Flat int32 ids and int64 offsets [N + 1] of ragged rows."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets


def build_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    columns: Mapping[str, NDArray[np.generic]] | None = None,
    finish_reasons: Sequence[str] = (),
    prompt_row_ids: Sequence[str] = (),
) -> Sequences:
    """Sequences from ragged lists; `columns` are already flat over all response tokens."""
    prompt_ids, prompt_offsets = flatten(prompts)
    response_ids, response_offsets = flatten(responses)
    return Sequences(
        prompt_ids,
        prompt_offsets,
        response_ids,
        response_offsets,
        columns or {},
        list(finish_reasons),
        list(prompt_row_ids),
    )


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """All rows of all parts, in order; every part has the same columns, and all or none have teacher prompts."""
    seen = [p.teacher_prompts for p in parts if p.teacher_prompts is not None]

    def joined_offsets(offsets: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(o) for o in offsets]))]).astype(np.int64)

    return Sequences(
        np.concatenate([p.prompt_ids for p in parts]),
        joined_offsets([p.prompt_offsets for p in parts]),
        np.concatenate([p.response_ids for p in parts]),
        joined_offsets([p.response_offsets for p in parts]),
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        [reason for p in parts for reason in p.finish_reasons],
        [row_id for p in parts for row_id in p.prompt_row_ids],
        TeacherPrompts(np.concatenate([s.ids for s in seen]), joined_offsets([s.offsets for s in seen]))
        if seen
        else None,
        [domain for p in parts for domain in p.domains],
    )
