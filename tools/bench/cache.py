"""Measures the teacher cache's format on a fixed fixture: `python tools/bench/cache.py --json FILE`.

The fixture has 10 million response tokens, Zipf-distributed over a vocabulary of 151,936 shuffled ids, with 1,000
tokens per response and 100 per prompt, all from one seed. Log-probs are those of the Zipf law with one nat of noise, so
their mantissas are as random as a model's; the top 16 are Zipf draws at each position. Bytes are those of all shard
files, prompts, row ids and CRCs included, per response token. Times are CPU seconds of this process, pinned to one
core, the smallest of five: the files are in the page cache, and other load on the machine hardly counts. `read` decodes
and checks the compact shards with behaviour log-probs; `batch` copies shuffled batches of 256 rows from the flat file.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.cache.flat import open_flat, read_flat, write_flat
from opd_mcp.engine.cache.manifest import RolloutTally, write_manifest
from opd_mcp.engine.cache.shards import compacted, read_shard, write_shard
from opd_mcp.engine.data.sequences import Sequences
from opd_mcp.schemas.cache import CacheManifest, ScoreStatistics
from opd_mcp.schemas.identity import ModelIdentity
from opd_mcp.schemas.recipes import Sampling

VOCABULARY = 151_936
ROWS, RESPONSE, PROMPT, TOP = 10_000, 1_000, 100, 16
SHARD_ROWS, BATCH_ROWS, REPEATS = 4096, 256, 5
BARS = {
    "bytes_per_token_compact": ("at most", 4.2),
    "bytes_per_token_compact_behaviour": ("at most", 6.5),
    "bytes_per_token_top16": ("at most", 90),
    "read_tokens_per_s": ("at least", 2e7),
    "batch_tokens_per_s": ("at least", 1e8),
}


class Fixture:
    """Seeded rows, drawn again for each shard, so that nothing large stays in memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self._logp = np.log(weights / weights.sum())
        self._cumulative = np.cumsum(weights / weights.sum())
        self._ids = np.random.default_rng(1).permutation(VOCABULARY).astype(np.int32)

    def shard(self, first: int, *, behaviour: bool, top: int) -> Sequences:
        """The rows of the shard that starts at row `first`."""
        rng = np.random.default_rng([2, first])
        rows = min(SHARD_ROWS, self.rows - first)
        ranks = self._ranks(rng, rows * RESPONSE)
        columns: dict[str, np.ndarray] = {"teacher_logprobs": self._noisy(rng, ranks)}
        if behaviour:
            columns["behaviour_logprobs"] = self._noisy(rng, ranks)
        if top:
            best = self._ranks(rng, rows * RESPONSE * top).reshape(-1, top)
            columns["topk_ids"] = self._ids[best]
            columns["topk_logprobs"] = -np.sort(-self._noisy(rng, best), axis=1)
        return Sequences(
            self._ids[self._ranks(rng, rows * PROMPT)],
            np.arange(rows + 1, dtype=np.int64) * PROMPT,
            self._ids[ranks],
            np.arange(rows + 1, dtype=np.int64) * RESPONSE,
            columns,
            ["eos"] * rows,
            [str(first + row) for row in range(rows)],
        )

    def _ranks(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.minimum(np.searchsorted(self._cumulative, rng.random(count)), VOCABULARY - 1)

    def _noisy(self, rng: np.random.Generator, ranks: np.ndarray) -> np.ndarray:
        return np.minimum(self._logp[ranks] + rng.normal(size=ranks.shape), -1e-6).astype(np.float32)


def written(folder: Path, fixture: Fixture, *, behaviour: bool, top: int) -> float:
    """Bytes per response token of the shards that this writes to the folder."""
    folder.mkdir()
    shards, tally = [], RolloutTally()
    for number, first in enumerate(range(0, fixture.rows, SHARD_ROWS)):
        small, _ = compacted(fixture.shard(first, behaviour=behaviour, top=top), "float16")
        shards.append(write_shard(folder / f"shard-{number:05d}.parquet", small))
        tally.add(small)
    someone = ModelIdentity(name="fixture", weights="0" * 64, tokenizer="0" * 64, special_tokens="0" * 64)
    manifest = CacheManifest(
        teacher=someone,
        behaviour=someone,
        prompts_sha256="0" * 64,
        sampling=Sampling(),
        seed=0,
        eos_token_ids=[0],
        topk=top,
        dtype="float16",
        vocab_size=VOCABULARY,
        shards=shards,
        rollouts=tally.statistics(),
        scores=ScoreStatistics(mean_teacher_logprob=0, mean_behaviour_logprob=0, reverse_kl_k1=0, reverse_kl_k3=0),
        lacks=[] if behaviour else ["behaviour_logprobs"],
    )
    write_manifest(folder, manifest)
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return size / manifest.tokens


def seconds(work: Callable[[], object]) -> float:
    """The smallest CPU time of REPEATS tries, in seconds."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def measured(folder: Path, rows: int) -> dict[str, float]:
    """All figures by name."""
    fixture, tokens = Fixture(rows), rows * RESPONSE
    figures = {
        "bytes_per_token_compact": written(folder / "compact", fixture, behaviour=False, top=0),
        "bytes_per_token_compact_behaviour": written(folder / "behaviour", fixture, behaviour=True, top=0),
        "bytes_per_token_top16": written(folder / "top16", fixture, behaviour=False, top=TOP),
    }
    cache = folder / "behaviour"
    shards = sorted(cache.glob("*.parquet"))
    figures["read_tokens_per_s"] = tokens / seconds(lambda: [read_shard(shard) for shard in shards])
    figures["flat_write_tokens_per_s"] = tokens / seconds(lambda: write_flat(cache))
    figures["flat_open_tokens_per_s"] = tokens / seconds(lambda: read_flat(cache))
    flat = open_flat(cache)

    def epoch() -> None:
        order = np.random.default_rng(3).permutation(rows)
        for start in range(0, rows, BATCH_ROWS):
            flat.take(order[start : start + BATCH_ROWS])

    figures["batch_tokens_per_s"] = tokens / seconds(epoch)
    return figures


def encodings() -> None:
    """Print bytes per token and decoding speed of ids and log-probs in each Parquet encoding, zstd level 1."""
    fixture, folder = Fixture(2_000), Path(tempfile.mkdtemp())
    rows = fixture.shard(0, behaviour=False, top=0)
    small, _ = compacted(rows, "float16")
    file, tokens = folder / "column.parquet", len(rows.response_ids)
    for name, values, tried in (
        ("ids", rows.response_ids, ("PLAIN", "dictionary", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT")),
        ("float16", small.columns["teacher_logprobs"], ("PLAIN", "BYTE_STREAM_SPLIT")),
    ):
        lists = pa.LargeListArray.from_arrays(pa.array(rows.response_offsets), pa.array(values))
        for encoding in tried:
            how = {"use_dictionary": True, "dictionary_pagesize_limit": 1 << 24}
            if encoding != "dictionary":
                how = {"use_dictionary": False, "column_encoding": {"x.list.element": encoding}}
            pq.write_table(pa.table({"x": lists}), file, compression="zstd", compression_level=1, **how)
            speed = tokens / seconds(lambda: pq.read_table(file, use_threads=False)) / 1e6
            print(f"{name:8} {encoding:20} {file.stat().st_size / tokens:6.2f} bytes {speed:6.0f} million tokens/s")
    shutil.rmtree(folder)


def main() -> None:
    """Print the figures next to their bars, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS, help="fewer than 10,000 for a quick look only")
    parser.add_argument("--encodings", action="store_true", help="compare encodings of one column instead")
    given = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if given.encodings:
        encodings()
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), given.rows)
    for name, value in figures.items():
        word, bar = BARS.get(name, ("", 0))
        print(f"{name:36} {value:14.4g}  {word} {bar:g}" if word else f"{name:36} {value:14.4g}")
    met = all(figures[name] <= bar if word == "at most" else figures[name] >= bar for name, (word, bar) in BARS.items())
    if given.json:
        given.json.write_text(json.dumps({"rows": given.rows, "bars_met": met, **figures}, indent=2) + "\n")
    raise SystemExit(not met)


if __name__ == "__main__":
    main()
