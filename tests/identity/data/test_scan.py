"""One pass over prompts says what reading them all would say."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import prompts_hash
from opd_mcp.identity.data.scan import eval_overlap, normalised, normalised_all, overlap_of, scan_of_rows, scan_prompts
from opd_mcp.schemas.base import content_hash

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"
# By the version that read prompts only as its own format: artifacts are found by these.
HASHES = {
    "eval.jsonl": "1b70e43b6bf74a39c99435cf8782df176172e4012c8c8bb9e44dd53c821f8e32",
    "opd.jsonl": "d3c94abee77072af20e3814e442bc7139e1587ebee44f2d86765920950dbaaad",
    "sft.jsonl": "07c0306459badcb6a9f8aaeb248c5758d5b1a48e81cdf50e3b7e832af18c108a",
    "tune.jsonl": "1f636cee7a4de1733fc4b5799c3bedd47242618c923fd587765af042fc2d290b",
}
ODD_ROWS = [
    {"prompt": "Zähle: 1+1=?", "answer": 2, "id": 7, "source": "x"},
    {
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": 'a "quote" \\ \n\u2028'}],
        "solution": "\\boxed{3}",
    },
    {"prompt": "x", "reward_model": {"ground_truth": "5"}, "answer": None},
    {"prompt": "y", "answer": "8.0"},
    {"prompt": "z", "answer": 0.5},
    {"prompt": "w", "solution": "\\boxed{3}", "final_answer": "4"},
]
ODD_HASH = "fe93102b84415b571a76d560a301a5e52dc619f4b15fd3127ca478cd8306f4e6"


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", HASHES)
def test_files_of_our_own_form_keep_their_hash(name):
    rows = read_prompts(EXAMPLES / name)
    assert prompts_hash(rows) == scan_prompts(EXAMPLES / name).sha256 == HASHES[name]


def test_fields_that_were_never_read_change_no_hash(tmp_path):
    file = jsonl(tmp_path / "odd.jsonl", ODD_ROWS)
    assert prompts_hash(read_prompts(file)) == scan_prompts(file).sha256 == ODD_HASH


def test_a_scan_counts_what_the_rows_hold(tmp_path):
    rows = [{"prompt": f"{i % 150}+1=?", "answer": i} if i % 3 else {"prompt": f"{i % 150}+1=?"} for i in range(400)]
    file = jsonl(tmp_path / "p.jsonl", [*rows, {"prompt": "é" * 30}, {"prompt": "x" * 41}])
    scan = scan_prompts(file, long_bytes=40)
    read = read_prompts(file)
    assert (scan.rows, scan.rows_with_answer) == (402, sum(row.answer is not None for row in read))
    assert scan.duplicates() == 402 - len({row.prompt for row in read})
    assert scan.first == tuple(read[:8])
    assert (scan.long_rows, scan.long_texts) == (2, ("é" * 30, "x" * 41))
    assert 64 <= len(scan.sample) < 128
    distance = int(scan.sample[1].id)
    assert [int(row.id) for row in scan.sample] == list(range(0, 402, distance))


def test_a_small_set_is_sampled_from_its_beginning(tmp_path):
    scan = scan_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(100)]))
    assert [row.prompt for row in scan.sample] == [str(i) for i in range(64)]


def test_of_many_long_texts_a_bounded_sample_is_kept(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i:04d}" * 20} for i in range(2000)])
    scan = scan_prompts(file, long_bytes=40)
    assert (scan.long_rows, len(scan.long_texts)) == (2000, 512)
    mean = sum(int(text[:4]) for text in scan.long_texts) / 512
    assert 900 < mean < 1100, "drawn from all of the file"
    assert scan.long_texts == scan_prompts(file, long_bytes=40).long_texts


texts = st.lists(st.text(alphabet="aB +-é\0．１?", min_size=1, max_size=4), max_size=12)


@settings(max_examples=100)
@given(training=texts, evaluation=texts)
def test_overlap_by_hashes_is_overlap_by_texts(tmp_path, training, evaluation):
    scans = []
    for name, some in (("a", training), ("b", evaluation)):
        file = jsonl(tmp_path / f"{name}.jsonl", [{"prompt": text} for text in [*some, "kept"]])
        scans.append(scan_prompts(file))
    expected = eval_overlap([*training, "kept"], [*evaluation, "kept"])
    assert scans[0].overlap(scans[1]) == expected
    assert overlap_of([scans[1]], [scans[0], scans[0]]) == eval_overlap([*evaluation, "kept"], [*training, "kept"])
    assert normalised_all(training) == [normalised(text) for text in training]


@given(rows=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=6))
def test_the_hash_taken_in_batches_is_that_of_the_whole_list(rows):
    from opd_mcp.identity.data.rows import PromptRow, PromptsHash

    digest = PromptsHash()
    parts = [(identity, text, None, None) for identity, text in rows]
    digest.add(parts[:2])
    digest.add(parts[2:])
    assert digest.hexdigest() == content_hash([list(row) for row in parts])
    assert digest.hexdigest() == scan_of_rows([PromptRow(*row) for row in parts]).sha256


@pytest.mark.parametrize("every", [1, 3])
def test_expected_answers_are_kept_at_even_distances(tmp_path, every):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{n}", **({"answer": f"{n}"} if n % every == 0 else {})} for n in range(20_000)]
    rows.append({"prompt": "long", "answer": "x" * (1 << 15)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scan = scan_prompts(file)
    assert 1024 <= len(scan.golds) < 2048
    assert all(row == answer for row, answer in scan.golds)
    numbers = [int(row) for row, _ in scan.golds]
    assert {later - earlier for earlier, later in pairwise(numbers)} == {numbers[1]}
