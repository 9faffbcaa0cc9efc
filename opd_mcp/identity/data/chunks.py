"""Raw rows in chunks, as every format gives them, and the errors of files that cannot be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.schemas.errors import DataError, IntegrityError, ResourceError

MAX_ROWS = 5_000_000
MAX_ROW_BYTES = 16 << 20

Row = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used: `code` as in the error tree, `why` in a few words, `fix` one next step."""

    def __init__(self, code: str, why: str, fix: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file, each with its line (of text) or its number (of a table), from 1."""

    file: Path
    lines: Sequence[int]
    rows: list[Row | BadRow]


def too_large(path: Path, what: str) -> DataError:
    """The error for data beyond a limit."""
    return DataError(
        "too_large",
        f"{path.name} holds {what}.",
        value=path,
        fix="Give a part of it; runs cycle through their prompts.",
    )


def damaged(path: Path, kind: str, error: Exception) -> IntegrityError:
    """The error for a file whose bytes are not what its format says."""
    return IntegrityError(
        "damaged_file",
        f"{path.name} is not a readable {kind} ({short(error)}).",
        value=path,
        fix="Write or copy the file again.",
    )


def short(error: Exception) -> str:
    """The first line of an exception's text."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def open_pyarrow(path: Path) -> Any:
    """The package with what reads Parquet and Arrow; raises ResourceError `missing_package`."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ResourceError(
            "missing_package", "Reading this format needs pyarrow.", value=path, fix="Install pyarrow, or give JSONL."
        ) from error
    return pyarrow
