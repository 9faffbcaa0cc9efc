"""Prompts and responses read from data of any known shape, checked before any work starts.

Rows that cannot be used are skipped, counted, and the first of them listed; a data set without one usable row is an
error that names the fields found and the nearest mapping.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import isnan
from pathlib import Path
from typing import Any, Generic, TypeVar

from opd_mcp.identity.data.formats import read_chunks
from opd_mcp.identity.data.rows import BadRow, Chunk, PromptRow, RawIds, ResponseRow, Row, is_turns, missing
from opd_mcp.identity.data.shapes import (
    PROMPT_SHAPES,
    RESPONSE_SHAPES,
    Shape,
    all_prompt_parts,
    has_required,
    prompt_parts,
    response_row,
    shape_of,
    shape_of_columns,
    value_at,
)
from opd_mcp.identity.data.sources import Source, source_of
from opd_mcp.identity.data.tables import table_header, table_ids
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import DataError, nearest
from opd_mcp.schemas.runs import SkippedRow, UnderstoodData

LISTED_ROWS = 5
HEADER_ROWS = 64
LISTED_REASONS = 20
LISTED_FIELDS = 40
# A data set whose rows have ever new fields must not fill the memory with them.
MAX_FIELD_SETS = 1000
Columns = Mapping[str, str]
RowT = TypeVar("RowT")
MakeRow = Callable[[Shape, Row, int], RowT]
MakeRows = Callable[[Shape, Chunk, int], list[RowT] | None]
"""The rows of a chunk, all of one shape and with the same fields; None where they must be made one by one."""


@dataclass(frozen=True)
class ResponsesHeader:
    """What a responses data set holds, before it is read for training."""

    source: Source
    rows: int
    has_text: bool
    has_ids: bool
    sha256: str
    """Of the files' bytes, and of `columns` where the caller named them."""
    understood: UnderstoodData
    first: tuple[ResponseRow, ...] = ()
    """The first rows, up to 64."""
    raw_ids: RawIds | None = None
    """Extremes of the token ids in all rows; None where rows have none."""


def read_prompts(path: Path, columns: Columns | None = None) -> list[PromptRow]:
    """The prompts of a data set: a file, a glob, a folder of shards or a `save_to_disk` folder (docs/data.md).

    `columns` names the field of each part, e.g. {"prompt": "question"}; without it the shape is recognised.
    Raises PathError `not_found`; DataError `missing_field`, `malformed_line`, `empty_data`, `unknown_format`,
    `too_large`; ArgumentError `invalid_argument` for `columns`; IntegrityError `damaged_file`. Text formats need
    nothing but the standard library.
    """
    reader = RowReader(path, PROMPT_SHAPES, prompt_parts, columns, all_prompt_parts)
    return [PromptRow(*parts) for batch in reader.batches() for parts in batch]


def read_responses(path: Path, columns: Columns | None = None) -> list[ResponseRow]:
    """Prompts with their responses: text, token ids, or chats that end with the assistant's turn; as `read_prompts`."""
    reader = RowReader(path, RESPONSE_SHAPES, response_row, columns)
    return [row for rows in reader.batches() for row in rows]


def read_responses_header(path: Path, columns: Columns | None = None) -> ResponsesHeader:
    """Row count and kind of responses, every row checked (of Parquet the first ones); raises as `read_prompts`."""
    reader = RowReader(path, RESPONSE_SHAPES, response_row, columns)
    sha256 = responses_sha256(path, columns)
    has_text = has_ids = True
    table = table_header(reader.source)
    first: list[ResponseRow] = []
    raw = RawIds()
    for rows in reader.batches():
        first += rows[: HEADER_ROWS - len(first)]
        for row in rows:
            if ids := [*(row.prompt_ids or ()), *(row.response_ids or ())]:
                raw.add(f"row {row.prompt.id}", max(ids), len(ids))
        has_text = has_text and all(row.response is not None for row in rows)
        has_ids = has_ids and all(row.response_ids is not None for row in rows)
        if table is not None and reader.rows:
            break
    understood = reader.understood()
    if table is not None and table[0] > reader.rows + reader.skipped:
        checked = reader.rows + reader.skipped
        note = f"the first {checked} of {table[0]} rows were checked"
        update = {"rows": table[0] - reader.skipped, "notes": [*understood.notes, note]}
        understood = understood.model_copy(update=update)
        if raw.shortest is not None:
            paths = [understood.columns.get(part) for part in ("prompt_ids", "response_ids")]
            raw = table_ids(reader.source, [path for path in paths if path is not None])
    return ResponsesHeader(
        *(reader.source, understood.rows, has_text, has_ids, sha256, understood, tuple(first)),
        raw_ids=None if raw.shortest is None else raw,
    )


def first_response(path: Path, columns: Columns | None = None) -> ResponseRow:
    """The first usable row of a responses data set; raises as `read_prompts`."""
    return next(row for rows in RowReader(path, RESPONSE_SHAPES, response_row, columns).batches() for row in rows)


def responses_sha256(path: Path, columns: Columns | None = None) -> str:
    """sha256 (hex) of a responses data set's bytes, and of how the caller maps its columns."""
    sha256 = source_of(path).sha256()
    return content_hash({"files": sha256, "columns": dict(columns)}) if columns else sha256


class RowReader(Generic[RowT]):
    """Reads a data set once, batch by batch, and keeps count of what was understood and what was skipped."""

    def __init__(
        self,
        path: Path,
        shapes: Sequence[Shape],
        make: MakeRow[RowT],
        columns: Columns | None = None,
        make_all: MakeRows[RowT] | None = None,
    ) -> None:
        self.source = source_of(path)
        self.rows = 0
        self.skipped = 0
        self._shapes = shapes
        self._make = make
        self._make_all = make_all
        self._columns = dict(columns or {})
        self._named = shape_of_columns(columns, shapes) if columns else None
        # Named fields that no row has had so far.
        self._unseen = set(columns.values()) if columns else set()
        self._by_fields: dict[tuple[str, ...], Shape | None] = {}
        self._used: dict[str, Shape] = {}
        self._fields: dict[str, Any] = {}
        self._listed: list[SkippedRow] = []
        self._reasons: Counter[str] = Counter()
        self._first_bad: tuple[str, BadRow] | None = None

    def batches(self) -> Iterator[list[RowT]]:
        """The usable rows in order, some at a time; raises at the end for no row, or a named field that no row has."""
        index = 0
        make, shape_for = self._make, self._shape_for
        for chunk in read_chunks(self.source, self._selected):
            made = self._made_at_once(chunk, index) or []
            if made:
                index += len(made)
                self.rows += len(made)
                yield made
                continue
            for position, row in enumerate(chunk.rows):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    shape, present = shape_for(row)
                    made.append(make(shape, present, index + position))
                except BadRow as bad:
                    self._skip(chunk, position, bad)
            index += len(chunk)
            self.rows += len(made)
            yield made
        self._require_rows()

    def _made_at_once(self, chunk: Chunk, index: int) -> list[RowT] | None:
        """The rows of a chunk whose fields are all the same and were met before; None for other chunks."""
        if self._make_all is None or self._unseen:
            return None
        fields = chunk.fields()
        shape = self._by_fields.get(fields) if fields else None
        return None if shape is None else self._make_all(shape, chunk, index)

    def understood(self) -> UnderstoodData:
        """How the rows that were read so far are understood."""
        shapes = list(self._used.values())
        columns = {part: path for shape in reversed(shapes) for part, path in shape.columns().items()}
        roots = set(self._fields) | {path.split(".")[0] for path in self._fields}
        columns = {part: path for part, path in columns.items() if path in roots or path.split(".")[0] in roots}
        read = {path.split(".")[0] for path in columns.values()} | set(columns.values())
        return UnderstoodData(
            shape=" + ".join(dict.fromkeys(shape.name for shape in shapes)) or "unknown",
            columns=columns,
            unused=[name for name in self._fields if name.split(".")[0] not in read][:LISTED_FIELDS],
            files=len(self.source.files),
            rows=self.rows,
            skipped=self.skipped,
            skipped_by_reason=dict(self._reasons.most_common(LISTED_REASONS)),
            skipped_rows=self._listed,
            notes=self._notes(shapes, columns),
        )

    def _notes(self, shapes: Sequence[Shape], columns: Columns) -> list[str]:
        notes = []
        prompts = self._shapes is PROMPT_SHAPES
        if prompts and any(shape.turns for shape in shapes):
            notes.append("of a chat that ends with the assistant's turn, the turns before it are the prompt")
        if "answer" in columns and any(shape.gold != "as it is" for shape in shapes):
            gold = next(shape.gold for shape in shapes if shape.gold != "as it is")
            notes.append(f"answer: what stands {gold}")
        if "solution" in columns and "answer" not in columns:
            notes.append("answer: what the last \\boxed{} of the solution holds")
        return notes

    def _shape_for(self, row: Row) -> tuple[Shape, Row]:
        """The shape of a row, and the row without missing values; raises BadRow for one of no shape."""
        for value in row.values():
            if value is None or (value.__class__ is float and isnan(value)):  # pandas writes NaN for missing
                row = {name: value for name in row if (value := value_at(row, name)) is not None}
                break
        fields = tuple(row)
        shape = self._by_fields.get(fields, self._named)
        if shape is None or self._unseen or fields not in self._by_fields:
            shape = self._new_shape(row, fields)
        if shape is None:
            raise missing("prompt") if self._shapes is PROMPT_SHAPES else self._no_response(row)
        return shape, row

    def _new_shape(self, row: Row, fields: tuple[str, ...]) -> Shape | None:
        if len(self._by_fields) >= MAX_FIELD_SETS:
            self._by_fields.clear()
        if len(self._fields) < LISTED_FIELDS or self._unseen:
            for path, value in paths_in(row).items():
                self._fields.setdefault(path, value)
        self._unseen -= {path for path in self._unseen if value_at(row, path) is not None}
        shape = self._named or shape_of(row, self._shapes)
        self._by_fields[fields] = shape
        if shape is not None:
            self._used.setdefault(shape.name, shape)
        return shape

    def _no_response(self, row: Row) -> BadRow:
        if shape_of(row, PROMPT_SHAPES) is None:
            return missing("prompt")
        return missing("response")

    def _selected(self, names: Sequence[str]) -> Sequence[str]:
        """The columns of a table that are read; raises DataError where they make no known shape."""
        for name in names:
            self._fields.setdefault(name, None)

        def has(path: str) -> bool:
            return path in names or path.split(".", maxsplit=1)[0] in names

        if self._named is not None:
            absent = {path for path in self._unseen if not has(path)}
            if absent:
                raise self._absent(absent)
            fitting = [self._named]
        else:
            fitting = [shape for shape in self._shapes if has_required(shape, has)]
            if not fitting:
                found = shape_of(dict.fromkeys(names, ""), self._shapes)
                if found is None:
                    raise self._refusal()
                fitting = [found]
        own = [shape for shape in fitting if shape.name in ("prompt", "messages")]
        paths = {path for shape in own or fitting[:1] for path in shape.columns().values()}
        return [name for name in names if name in paths | {path.split(".")[0] for path in paths}]

    def _skip(self, chunk: Chunk, position: int, bad: BadRow) -> None:
        self.skipped += 1
        if len(self._listed) < LISTED_ROWS:
            place = f"{chunk.file.name} line {chunk.lines[position]}"
            self._first_bad = self._first_bad or (place, bad)
            self._listed.append(SkippedRow(place=place, reason=bad.why))
        reason = bad.why.split(" (")[0]
        if reason in self._reasons or len(self._reasons) < 10 * LISTED_REASONS:
            self._reasons[reason] += 1

    def _require_rows(self) -> None:
        if self._unseen and (self.rows or self._fields):
            raise self._absent(self._unseen)
        if self.rows:
            return
        name, path = self.source.name, self.source.path
        if self._first_bad is None:
            raise DataError("empty_data", f"{name} holds no rows.", value=path, fix="Give data with at least one row.")
        if not self._used and self._fields:
            raise self._refusal()
        place, bad = self._first_bad
        raise DataError(
            bad.code,
            f"None of the {self.skipped} rows of {name} can be used; {place}: {bad.why}.",
            value=f"{self.source.files[0]}:{place.rsplit(' ', 1)[-1]}",
            fix=bad.fix,
        )

    def _refusal(self) -> DataError:
        """The error for fields that make no known shape, with the mapping that is likeliest meant."""
        responses = self._shapes is RESPONSE_SHAPES
        guess = nearest_columns(self._fields, responses=responses)
        needed = "prompts with responses" if responses else "prompts"
        example = guess or {"prompt": "…", **({"response": "…"} if responses else {"answer": "…"})}
        return DataError(
            "missing_field",
            f"{self.source.name} holds no {needed} in a known shape. Fields found: {self._found()}.",
            value=self.source.path,
            nearest=[f"columns={_text(guess)}"] if guess else [],
            fix=f"Name the fields: columns={_text(example)}.",
        )

    def _absent(self, paths: set[str]) -> DataError:
        """The error for fields that `columns` names and no row has."""
        absent = sorted(paths)
        named = self._columns
        closest = {path: nearest(path, self._fields) for path in absent}
        fixed = {part: (closest.get(path) or [path])[0] for part, path in named.items()}
        known = fixed != named
        return DataError(
            "missing_field",
            f"No row of {self.source.name} has the field {', '.join(map(repr, absent))} that columns names. "
            f"Fields found: {self._found()}.",
            value=named,
            nearest=[f"columns={_text(fixed)}"] if known else [],
            fix=f"Name fields that are there: columns={_text(fixed if known else {'prompt': '…'})}.",
        )

    def _found(self) -> str:
        names = list(self._fields)
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        return (", ".join(names[:12]) or "none") + more


def _text(columns: Mapping[str, str]) -> str:
    return json.dumps(dict(columns), ensure_ascii=False)


# What fields that hold a prompt, an answer or a response are called, likeliest first.
_NAMES = {
    "prompt": ("prompt", "question", "problem", "query", "instruction", "input", "task", "user", "text"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "turns"),
    "answer": ("answer", "final_answer", "ground_truth", "gold", "target", "label", "solution", "expected"),
    "response": ("response", "completion", "output", "reply", "generation", "assistant", "target", "solution"),
}


def nearest_columns(fields: Mapping[str, Any], *, responses: bool) -> dict[str, str]:
    """The likeliest `columns` for a file, from its fields (paths) with one value of each; may be empty."""
    chats = [path for path, value in fields.items() if is_turns(value)]
    texts = [path for path, value in fields.items() if isinstance(value, str | int | float) and value != ""]
    guess: dict[str, str] = {}
    for part in ("prompt", "response" if responses else "answer"):
        close = _closest(_NAMES[part], [path for path in texts if path not in guess.values()])
        if close is not None:
            guess[part] = close
    if "prompt" not in guess and chats:
        return {"messages": _closest(_NAMES["messages"], chats) or chats[0], **guess}
    if "prompt" not in guess and texts:
        guess["prompt"] = max(texts, key=lambda path: len(str(fields[path])))
    return (
        {part: guess[part] for part in ("prompt", "response", "answer") if part in guess} if "prompt" in guess else {}
    )


def paths_in(row: Row) -> dict[str, Any]:
    """A row's fields with their values, those of nested objects by dotted path."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found[name] = value
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": part for inner, part in value.items()}
    return found


def _closest(names: Iterable[str], paths: Sequence[str]) -> str | None:
    best, score = None, 0.74
    for path in paths:
        last = path.rsplit(".", 1)[-1].lower()
        for name in names:
            ratio = SequenceMatcher(None, last, name).ratio()
            if ratio > score:
                best, score = path, ratio
    return best
