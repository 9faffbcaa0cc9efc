"""Looking at a cache costs a model little, however long its rows, texts and tokens are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.cache import CacheManifest, Hygiene, RolloutStatistics, ScoreStatistics, Shard
from opd_mcp.server.render.caches import inspection_text
from opd_mcp.views.cache import inspect_cache

STUDENT = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "student"
WORDS = ["a", "word", "\n" * 60, "漢字" * 20, "😀", "-" * 128, "\x07"]
# a token of the common vocabularies is two bytes or more of such text, and mostly four
BYTES_FOR_2K_TOKENS = 5_000


@pytest.fixture
def long_cache(tmp_path: Path) -> Path:
    """Rows of 4,000 prompt and 3,000 response tokens, some of them very long texts."""
    Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)})).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
    prompt, response = [n % 7 for n in range(4000)], [(3 * n) % 7 for n in range(3000)]
    row = {
        "prompt_id": "0",
        "prompt_ids": prompt,
        "response_ids": response,
        "finish_reason": "length",
        "teacher_logprobs": [-0.123456789 * n for n in response],
        "behaviour_logprobs": [-1.987654321 * n for n in response],
    }
    pq.write_table(pa.Table.from_pylist([row] * 5), tmp_path / "shard-00000.parquet")
    identity = inspect_model(STUDENT).identity
    manifest = CacheManifest(
        teacher=identity,
        behaviour=identity,
        prompts_sha256="0" * 64,
        sampling={"temperature": 1.0},
        seed=0,
        eos_token_ids=[1],
        topk=0,
        dtype="float32",
        vocab_size=7,
        shards=[Shard(file="shard-00000.parquet", rows=5, tokens=15000, prompt_tokens=20000, sha256="0" * 64)],
        rollouts=RolloutStatistics(
            rows=5,
            response_tokens=15000,
            mean_response_tokens=3000,
            truncated_fraction=1.0,
            eos_fraction=0.0,
            empty_responses=0,
            duplicate_rows=4,
        ),
        scores=ScoreStatistics(
            mean_teacher_logprob=-1.0, mean_behaviour_logprob=-1.0, reverse_kl_k1=0.1, reverse_kl_k3=0.2
        ),
        hygiene=Hygiene(quarantined={"log-prob is not finite": 3, "longer than the server's context": 2}),
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def test_long_rows_are_cut_to_their_first_and_last_tokens_with_both_log_probs(long_cache):
    found = inspect_cache(long_cache)
    assert len(found.sample) == 2
    row = found.sample[0]
    assert row.response_tokens == 3000
    assert len(row.tokens) == 20
    assert [len(token) for token in row.tokens] == [3] * 20
    assert row.tokens[1] == ("漢字漢字漢字漢字漢…", -0.3704, -5.963)
    assert row.tokens[-1][0] == "\n" * 29 + "…"


def test_the_text_of_the_longest_rows_stays_within_two_thousand_tokens(long_cache):
    text = inspection_text(inspect_cache(long_cache))
    assert "token teacher/student: 'a' -0/-0" in text
    assert len(text.encode()) <= BYTES_FOR_2K_TOKENS


def test_the_structured_answer_stays_small_too(long_cache):
    assert len(json.dumps(inspect_cache(long_cache).to_dict()).encode()) <= 2 * BYTES_FOR_2K_TOKENS
