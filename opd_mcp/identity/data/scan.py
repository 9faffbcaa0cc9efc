"""What a plan needs of a prompts data set, in one pass and bounded memory; which prompts also stand in another set."""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import itemgetter
from pathlib import Path
from random import Random

from opd_mcp.identity.data.reading import Columns, RowReader
from opd_mcp.identity.data.rows import (
    PLAIN_PARTS,
    PromptParts,
    PromptRow,
    PromptsHash,
    TeacherTurnsHash,
    Turns,
    shown_texts,
    whole_text,
)
from opd_mcp.identity.data.shapes import PROMPT_SHAPES, all_prompt_parts, prompt_parts
from opd_mcp.schemas.runs import UnderstoodData

FIRST_ROWS = 8
SAMPLED_ROWS = 64
KEPT_GOLDS, GOLD_CHARACTERS = 1024, 1 << 14
LONG_ROWS = 512
KEPT_DOMAINS = 64
# English text has four or more; other languages and digits have fewer.
BYTES_PER_TOKEN = 3
# A text is kept for measuring up to here; what is longer is long by any limit.
LONG_CHARACTERS = 1 << 16
_CONTENT = itemgetter("content")


@dataclass(frozen=True)
class PromptScan:
    """Counts, hash and samples of prompts, and two 64-bit hashes per row, by which scans are compared."""

    sha256: str
    """As `prompts_hash` of all rows."""
    understood: UnderstoodData
    rows: int = 0
    rows_with_answer: int = 0
    first: tuple[PromptRow, ...] = ()
    """The first rows, for showing."""
    sample: tuple[PromptRow, ...] = ()
    """Rows at even distances, 64 to 127 where there are as many."""
    golds: tuple[tuple[str, str], ...] = ()
    """(id, expected answer) of rows at even distances, huge answers left out; 1024 to 2047 where there are as many."""
    long_bytes: int = 0
    long_rows: int = 0
    """Rows with more than `long_bytes` bytes of text."""
    long_texts: tuple[str, ...] = ()
    """The texts of these rows, evenly drawn where there are many."""
    texts: "array[int]" = field(default_factory=lambda: array("q"))
    normal_texts: "array[int]" = field(default_factory=lambda: array("q"))
    teacher_turns: str | None = None
    """As `TeacherTurnsHash` of all rows."""
    domains: Mapping[str | None, int] = field(default_factory=dict)
    """Rows by the domain of their teacher, of the first 64 domains; None for rows without one."""

    def guessed_tokens(self) -> float | None:
        """Mean tokens of a prompt by its bytes, for estimates without a tokenizer; None without prompts."""
        sizes = [len(row.text().encode(errors="replace")) for row in self.sample]
        return max(1.0, sum(sizes) / len(sizes) / BYTES_PER_TOKEN) if sizes else None

    def duplicates(self) -> int:
        """Rows with the text of an earlier row."""
        return self.rows - len(set(self.texts))

    def overlap(self, evaluation: "PromptScan") -> dict[str, int]:
        """How many prompts the evaluation set also holds, as `eval_overlap` counts them."""
        return overlap_of([self], [evaluation])


def overlap_of(scans: Sequence[PromptScan], others: Sequence[PromptScan]) -> dict[str, int]:
    """How many rows of `scans` one of `others` also holds, as they are and normalised."""
    return {
        "eval_overlap_exact": _held([scan.texts for scan in scans], [other.texts for other in others]),
        "eval_overlap_normalised": _held(
            [scan.normal_texts for scan in scans], [other.normal_texts for other in others]
        ),
    }


def _held(hashes: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """How many of the hashes are among the others. A set is made of the fewer ones only: making it takes the time."""
    few, many = sorted((hashes, others), key=lambda each: sum(map(len, each)))
    common = set(chain.from_iterable(few)).intersection(chain.from_iterable(many))
    return sum(map(common.__contains__, chain.from_iterable(hashes))) if common else 0


def scan_prompts(path: Path, columns: Columns | None = None, *, long_bytes: int = 1 << 62) -> PromptScan:
    """The scan of a data set's prompts, texts of more than `long_bytes` bytes counted; raises as `read_prompts`."""
    reader = RowReader(path, PROMPT_SHAPES, prompt_parts, columns, all_prompt_parts)
    scanner = _Scanner(long_bytes)
    for batch in reader.batches():
        scanner.add(batch)
    return scanner.scan(reader.understood())


def scan_of_rows(rows: Sequence[PromptRow], *, long_bytes: int = 1 << 62) -> PromptScan:
    """The scan of prompts that are in memory."""
    scanner = _Scanner(long_bytes)
    scanner.add([row.parts() for row in rows])
    return scanner.scan(UnderstoodData(shape="inline", rows=len(rows)))


class _Scanner:
    def __init__(self, long_bytes: int) -> None:
        self.long_bytes = long_bytes
        self.digest, self.teacher_turns = PromptsHash(), TeacherTurnsHash()
        self.domains: Counter[str | None] = Counter()
        self.rows = self.answers = self.long_rows = 0
        self.first: list[PromptParts] = []
        self.sample: list[PromptParts] = []
        self.distance = 1
        self.golds: list[tuple[str, str]] = []
        self.gold_distance = 1
        self.long_texts: list[str] = []
        self.texts, self.normal_texts = array("q"), array("q")
        self.random = Random(0)

    def add(self, batch: list[PromptParts]) -> None:
        """Take in the next rows."""
        simple = max(map(len, batch), default=PLAIN_PARTS) == PLAIN_PARTS
        self.digest.add(batch)
        if simple:
            self._count_domains({None: len(batch)} if batch else {})
        else:
            self.teacher_turns.add(batch)
            self._count_domains(Counter(parts[5] if len(parts) == 6 else None for parts in batch))
        self.first += batch[: FIRST_ROWS - len(self.first)]
        start = -self.rows % self.distance
        self.sample += batch[start :: self.distance]
        while len(self.sample) >= 2 * SAMPLED_ROWS:
            self.sample = self.sample[::2]
            self.distance *= 2
        if not batch:
            return
        plain = batch if simple else [parts[:PLAIN_PARTS] for parts in batch]
        ids, prompts, messages, answers = zip(*plain, strict=True)
        self._add_golds(ids, answers)
        shown = prompts if messages.count(None) == len(batch) else shown_texts(prompts, messages)
        self.texts.extend(map(hash, shown))
        self.normal_texts.extend(map(hash, normalised_all(shown)))
        self.answers += len(batch) - answers.count(None)
        self.rows += len(batch)
        self._add_long(prompts, messages, max(map(len, shown)))

    def _count_domains(self, found: Mapping[str | None, int]) -> None:
        for name, count in found.items():
            if name in self.domains or len(self.domains) < KEPT_DOMAINS:
                self.domains[name] += count

    def _add_golds(self, ids: Sequence[str], answers: Sequence[str | None]) -> None:
        if not any(answers):
            return
        if None in answers:
            present = [answer is not None for answer in answers]
            ids, answers = list(compress(ids, present)), list(compress(answers, present))
        kept = slice(-self.answers % self.gold_distance, None, self.gold_distance)
        chosen = zip(ids[kept], answers[kept], strict=True)
        self.golds += [(row, gold) for row, gold in chosen if gold is not None and len(gold) <= GOLD_CHARACTERS]
        while len(self.golds) >= 2 * KEPT_GOLDS:
            self.golds = self.golds[::2]
            self.gold_distance *= 2

    def _add_long(self, prompts: Sequence[str | None], messages: Sequence[Turns | None], longest: int) -> None:
        limit = self.long_bytes
        chats = list(filter(None, messages))
        if chats:
            longest = max(longest, *map(len, map(_CONTENT, chain.from_iterable(chats))))
            longest = (longest + 1) * max(map(len, chats))
        if 4 * longest <= limit:  # a character takes up to four bytes
            return
        for text in map(whole_text, prompts, messages):
            if len(text) <= limit and (text.isascii() or len(text.encode(errors="replace")) <= limit):
                continue
            self.long_rows += 1
            kept = text[: max(LONG_CHARACTERS, 32 * limit)]
            if len(self.long_texts) < LONG_ROWS:
                self.long_texts.append(kept)
            elif (place := self.random.randrange(self.long_rows)) < LONG_ROWS:  # algorithm R
                self.long_texts[place] = kept

    def scan(self, understood: UnderstoodData) -> PromptScan:
        """The scan of what was taken in."""
        sample = self.sample if self.distance > 1 else self.sample[:SAMPLED_ROWS]
        return PromptScan(
            sha256=self.digest.hexdigest(),
            understood=understood,
            rows=self.rows,
            rows_with_answer=self.answers,
            first=tuple(PromptRow(*parts) for parts in self.first),
            sample=tuple(PromptRow(*parts) for parts in sample),
            golds=tuple(self.golds),
            long_bytes=self.long_bytes,
            long_rows=self.long_rows,
            long_texts=tuple(self.long_texts),
            texts=self.texts,
            normal_texts=self.normal_texts,
            teacher_turns=self.teacher_turns.hexdigest(),
            domains=dict(self.domains),
        )


def eval_overlap(texts: list[str], evaluation: Iterable[str]) -> dict[str, int]:
    """How many prompts also stand in the evaluation set, as they are and normalised."""
    held_out = set(evaluation)
    normal = set(normalised_all(list(held_out)))
    return {
        "eval_overlap_exact": sum(text in held_out for text in texts),
        "eval_overlap_normalised": sum(text in normal for text in normalised_all(texts)),
    }


def normalised(text: str) -> str:
    """Letters, digits, symbols and arithmetic signs of a text, without case, white space and other punctuation."""
    if text.isascii():
        return text.encode().translate(_ASCII, _ASCII_DROPPED).decode()
    folded = unicodedata.normalize("NFKC", text).casefold().encode("utf-8", "surrogatepass")
    # Most characters are ASCII in most texts, and bytes are translated many times faster than characters.
    rest = folded.translate(None, _ASCII_DROPPED).decode("utf-8", "surrogatepass")
    return _NOT_ASCII.sub(lambda run: run[0].translate(_KEPT), rest)


def normalised_all(texts: Sequence[str]) -> list[str]:
    """Each text normalised; many at once, at a fraction of the time that they take one by one."""
    simple = list(map(str.isascii, texts))
    done = iter(_joined_normalised(list(compress(texts, simple))))
    if all(simple):
        return list(done)
    others = iter(_joined_normalised([text for text in texts if not text.isascii()]))
    return [next(done) if is_ascii else next(others) for is_ascii in simple]


def _joined_normalised(texts: list[str]) -> list[str]:
    """Texts normalised as one, with NUL between them: it separates them for all that depends on neighbours."""
    joined = "\0".join(texts)
    if not texts or joined.count("\0") != len(texts) - 1:
        return [normalised(text) for text in texts]
    if joined.isascii():
        return joined.encode().translate(_ASCII, _ASCII_DROPPED_BUT_NUL).decode().split("\0")
    folded = unicodedata.normalize("NFKC", joined).casefold().encode("utf-8", "surrogatepass")
    rest = folded.translate(None, _ASCII_DROPPED_BUT_NUL).decode("utf-8", "surrogatepass")
    for character in set(folded.translate(None, _ASCII_BYTES).decode("utf-8", "surrogatepass")):
        if _KEPT[ord(character)] is None:
            rest = rest.replace(character, "")
    return rest.split("\0")


def _is_kept(character: str) -> bool:
    # - and * are punctuation to Unicode, but between digits they are what tells two sums apart
    return not character.isspace() and (character in "-*/%" or unicodedata.category(character)[0] not in "PZC")


class _Kept(dict[int, int | None]):
    """Whether a character stays, decided once per character: a plan compares whole data sets."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if _is_kept(chr(code)) else None
        return self[code]


_KEPT = _Kept()
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_ASCII = bytes(ord(chr(code).casefold()) if code < 128 else code for code in range(256))
_ASCII_DROPPED = bytes(code for code in range(128) if not _is_kept(chr(code)))
_ASCII_BYTES = bytes(range(128))
_ASCII_DROPPED_BUT_NUL = _ASCII_DROPPED.replace(b"\0", b"")
