"""Which files a path to data means: a file, a glob, a folder of shards, or a folder that `save_to_disk` wrote."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd_mcp.identity.files import file_sha256, read_json_object
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import DataError, IntegrityError, PathError, ResourceError, nearest

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst")
KINDS = ".jsonl, .json, .csv, .tsv (each also as .gz or .zst), .parquet or .arrow"
# What our own artifact directories call their data, so that a file next to it causes no doubt.
ARTIFACT_FILES = ("prompts.jsonl", "responses.parquet")
# Descriptions that stand next to data; they are no data themselves.
DESCRIPTIONS = frozenset(
    {
        *("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"),
        *("lineage.json", "artifact.json", "cost.json"),
    }
)
MAX_FILES = 10_000
MAX_ROWS = 5_000_000
MAX_ROW_BYTES = 16 << 20
MAX_STATE_BYTES = 16 << 20


@dataclass(frozen=True)
class Source:
    """The files of one data set, in the order in which they are read, all of one format."""

    path: Path
    files: tuple[Path, ...]
    format: Format

    @property
    def name(self) -> str:
        """The data set's name in messages."""
        return self.path.name

    def sha256(self) -> str:
        """sha256 (hex) of the file's bytes; of several files, of their hashes in order."""
        hashes = [file_sha256(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else content_hash(hashes)


def format_of(path: Path) -> Format | None:
    """The format that a file's name says, `.gz` and `.zst` behind a text format included."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if not suffixes:
        return None
    if suffixes[-1] not in COMPRESSED:
        return SUFFIXES.get(suffixes[-1])
    inner = SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 else None
    return None if inner in ("parquet", "arrow") else inner


def is_glob(path: Path | str) -> bool:
    """Whether a path is a pattern rather than the name of something that is there."""
    return _has_wildcard(str(path)) and not Path(path).exists()


def matching_files(pattern: Path) -> list[Path]:
    """The files that a pattern such as `/data/train-*.parquet` matches, sorted by name; no folders.

    Wildcards may stand in the last two parts of the path. Raises PathError `not_found` when nothing matches.
    """
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if _has_wildcard(part))
    if first < len(parts) - 2 or "**" in parts:
        raise PathError(
            "not_found",
            "A pattern may hold wildcards in its last two parts only, and no **.",
            value=pattern,
            fix="Give a pattern such as /data/train-*.parquet.",
        )
    base = Path(*parts[:first])
    found = sorted(path for path in base.glob(str(Path(*parts[first:]))) if path.is_file()) if base.is_dir() else []
    if not found:
        raise PathError("not_found", "No file matches this pattern.", value=pattern, fix="Check the pattern.")
    return found


def source_of(path: Path) -> Source:
    """The data set that a path means.

    Raises PathError `not_found`, or DataError `unknown_format` for another kind of file or an unclear directory.
    """
    if is_glob(path):
        return _one_format(path, matching_files(path))
    if path.is_dir():
        return _source_in(path)
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PathError(
            "not_found",
            "There is no such file.",
            value=path,
            nearest=[str(path.parent / name) for name in nearest(path.name, siblings)],
            fix="Give the absolute path of a data file.",
        )
    return _one_format(path, [path])


def _one_format(path: Path, files: Iterable[Path]) -> Source:
    files = tuple(files)
    formats = {format_of(file) for file in files}
    if None in formats:
        unknown = next(file for file in files if format_of(file) is None)
        raise DataError(
            "unknown_format",
            f"{unknown.name} is no data file by its name.",
            value=unknown,
            fix=f"Give a file that ends in {KINDS}.",
        )
    if len(formats) > 1:
        raise DataError(
            "unknown_format",
            f"These files are of several formats ({', '.join(sorted(str(name) for name in formats))}).",
            value=path,
            fix="Give a pattern that matches files of one format.",
        )
    if len(files) > MAX_FILES:
        raise DataError(
            "too_large", f"These are {len(files)} files, more than {MAX_FILES}.", value=path, fix="Write larger shards."
        )
    found = formats.pop()
    assert found is not None
    return Source(path, files, found)


def _source_in(directory: Path) -> Source:
    for name in ARTIFACT_FILES:
        if (directory / name).is_file():
            return _one_format(directory, [directory / name])
    if (directory / "dataset_dict.json").is_file():
        return _only_split(directory)
    if (directory / "state.json").is_file():
        return _saved_to_disk(directory)
    shards = _shards(directory)
    if not shards and (directory / "data").is_dir():  # how the Hub lays out a repository
        directory, shards = directory / "data", _shards(directory / "data")
    if len(shards) == 1:
        return _one_format(directory, next(iter(shards.values())))
    count = sum(map(len, shards.values()))
    raise DataError(
        "unknown_format",
        f"This directory holds {count} data files of {len(shards)} names; the files of one data set have the same name "
        "but for their digits.",
        value=directory,
        nearest=[str(directory / name) for name in list(shards)[:3]],
        fix="Give the path of the file itself, or a pattern such as train-*.parquet.",
    )


def _shards(directory: Path) -> dict[str, list[Path]]:
    """Data files by name, digits left out: `train-00001-of-00002.parquet` and its sibling are one data set."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(directory.iterdir()):
        if path.name not in DESCRIPTIONS and not path.name.startswith(".") and format_of(path) and path.is_file():
            groups[re.sub(r"\d+", "*", path.name)].append(path)
    return {paths[0].name if len(paths) == 1 else name: paths for name, paths in groups.items()}


def _only_split(directory: Path) -> Source:
    splits = read_json_object(directory / "dataset_dict.json").get("splits")
    names = [name for name in splits if isinstance(name, str) and _is_plain(name)] if isinstance(splits, list) else []
    if len(names) == 1 and (directory / names[0]).is_dir():
        return _source_in(directory / names[0])
    raise DataError(
        "unknown_format",
        f"This data set has {len(names)} splits: {', '.join(names)[:200]}.",
        value=directory,
        nearest=[str(directory / name) for name in names[:3]],
        fix="Give the path of one split's folder.",
    )


def _saved_to_disk(directory: Path) -> Source:
    entries = read_json_object(directory / "state.json", MAX_STATE_BYTES).get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    files = [directory / name for name in names if isinstance(name, str) and _is_plain(name)]
    missing = [file.name for file in files if not file.is_file()]
    if not files or len(files) != len(names) or missing:
        raise DataError(
            "unknown_format",
            "state.json names no data files that are here" + (f" ({missing[0]} is missing)." if missing else "."),
            value=directory,
            fix="Save the data set again with save_to_disk, or give JSONL or Parquet.",
        )
    return _one_format(directory, files)


def _is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and "\0" not in name and name not in (".", "..")


def _has_wildcard(text: str) -> bool:
    return any(sign in text for sign in "*?[")


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
