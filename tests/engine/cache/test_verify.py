"""A cache is proven, repaired where that is possible, merged, and made of the paper authors' file."""

import json
import random
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_mcp.engine import stages
from opd_mcp.engine.cache.convert import converted
from opd_mcp.engine.cache.flat import FLAT_FILE, FlatProblem, open_flat, read_flat
from opd_mcp.engine.cache.manifest import read_cache, write_manifest
from opd_mcp.engine.cache.merge import merged
from opd_mcp.engine.cache.verify import value_problems, verified
from opd_mcp.engine.context import Context
from opd_mcp.engine.data.batches import shuffled_batches
from opd_mcp.engine.runtime import generator_for
from opd_mcp.engine.scoring.local import rescorer
from opd_mcp.identity.lineage import read_lineage, read_manifest
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import ArgumentError, ConsistencyError, DataError, IntegrityError
from opd_mcp.server.render.caches import manifest_lines

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "arithmetic"


@pytest.fixture
def cache(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns(FLAT_FILE)))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_a_hundred_flipped_bytes_are_all_found(cache):
    open_flat(cache)
    files = [*sorted(cache.glob("*.parquet")), cache / "manifest.json", cache / FLAT_FILE]
    good = {file: file.read_bytes() for file in files}
    assert verified(cache).problems == []
    rng, missed = random.Random(0), []
    for number in range(100):
        file = files[number % len(files)]
        place = rng.randrange(len(good[file]))
        flip(file, place)
        if not any(file.name in problem for problem in verified(cache).problems):
            missed.append((file.name, place))
        file.write_bytes(good[file])
    assert missed == []


def test_a_stale_or_damaged_flat_file_is_made_again_and_holds_the_same_rows(cache):
    rows = read_cache(cache)[1]
    open_flat(cache)
    whole = (cache / FLAT_FILE).read_bytes()
    for spoil in (
        lambda: flip(cache / FLAT_FILE, len(whole) // 2),
        lambda: (cache / FLAT_FILE).write_bytes(whole[:-100]),
        lambda: (cache / FLAT_FILE).write_bytes(b""),
        lambda: write_manifest(cache, read_manifest(cache).model_copy(update={"seed": 5})),
    ):
        spoil()
        with pytest.raises(FlatProblem):
            read_flat(cache)
        again = open_flat(cache)
        assert all(np.array_equal(values, again.columns[name]) for name, values in rows.columns.items())
        assert np.array_equal(rows.response_ids, again.response_ids)
        assert np.array_equal(rows.prompt_ids, again.prompt_ids)
    assert [file.name for file in cache.iterdir() if file.name.startswith(".")] == []


def test_why_a_flat_file_cannot_be_used_passes_through_a_context_manager():
    """It gets its traceback on the way, which a frozen exception would refuse."""

    @contextmanager
    def block():
        yield

    with pytest.raises(FlatProblem, match="stale") as caught, block():
        raise FlatProblem("stale")
    assert caught.value.why == "stale"


def test_a_cache_that_cannot_be_written_is_read_into_memory(cache, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("opd_mcp.engine.cache.flat.write_flat", refuse)
    assert np.array_equal(open_flat(cache).response_ids, read_cache(cache)[1].response_ids)
    assert not (cache / FLAT_FILE).exists()


def test_batches_by_seed_are_the_same_from_the_flat_file_after_a_restart(cache):
    rows, flat = read_cache(cache)[1], open_flat(cache)
    first = list(shuffled_batches(len(rows), 8, 12, generator_for(3, "distill", "order")))
    again = list(shuffled_batches(len(flat), 8, 12, generator_for(3, "distill", "order")))[5:]
    for indices, resumed in zip(first[5:], again, strict=True):
        one, two = rows.take(indices), read_flat(cache).take(resumed)
        assert np.array_equal(one.response_ids, two.response_ids)
        assert np.array_equal(one.columns["topk_logprobs"], two.columns["topk_logprobs"])


def test_training_from_the_flat_file_gives_the_bits_of_training_from_shards(build, cache, monkeypatch):
    def trained(name: str) -> dict[str, torch.Tensor]:
        return load_file(build.distilled(cache, name) / "model.safetensors")

    flat = trained("flat")
    assert (cache / FLAT_FILE).exists()
    monkeypatch.setattr(sys.modules[stages.distill.__module__], "open_flat", lambda path: read_cache(path)[1])
    shards = trained("shards")
    assert all(torch.equal(flat[name], shards[name]) for name in flat)


def test_a_changed_manifest_stops_training(build, cache):
    flip(cache / "manifest.json", 40)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        build.distilled(cache, "out")


def test_scoring_a_sample_again_finds_another_teacher(cache):
    good = verified(cache, rescorer(EXAMPLE / "teacher"), sample=8)
    assert good.problems == []
    assert good.rescored_rows == 8
    assert good.largest_difference < 1e-4
    other = verified(cache, rescorer(EXAMPLE / "teacher_other_style"), sample=8)
    assert "the teacher's log-probs differ" in other.problems[0]


def test_float16_is_within_its_rounding_of_the_teacher(build, drawn):
    found = verified(build.cache(drawn, "compact", recipe=build.scoring(dtype="float16")), rescorer(build.teacher))
    assert found.problems == []
    assert 0 < found.largest_difference < 0.02


def test_values_that_are_no_log_probs_are_named(finished):
    manifest, rows = read_cache(finished)

    def with_value(value: float) -> list[str]:
        spoiled = rows.columns["teacher_logprobs"].copy()
        spoiled[3] = value
        return value_problems(rows.with_columns(teacher_logprobs=spoiled), manifest)

    assert value_problems(rows, manifest) == []
    assert with_value(0.5) == ["teacher_logprobs is above 0"]
    assert with_value(float("nan")) == ["teacher_logprobs is not finite"]
    small = manifest.model_copy(update={"vocab_size": 5})
    assert "a token id is outside the vocabulary" in value_problems(rows, small)
    other_end = manifest.model_copy(update={"eos_token_ids": [5]})
    assert "a finish reason does not fit the last token" in value_problems(rows, other_end)


def test_counts_that_are_not_the_manifest_s_are_named(cache):
    manifest = read_manifest(cache)
    more = manifest.shards[1].model_copy(update={"rows": 9})
    write_manifest(cache, manifest.model_copy(update={"shards": [manifest.shards[0], more, *manifest.shards[2:]]}))
    assert "shard-00001.parquet has other counts than the manifest says" in verified(cache).problems


def test_a_teacher_with_a_padded_vocabulary_scores_and_names_only_tokens(build, drawn, finished):
    padded = Path(shutil.copytree(build.teacher, build.root / "padded"))
    config = json.loads((padded / "config.json").read_text())
    size, more = config["vocab_size"], 24
    tensors = load_file(padded / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape[0] == size and tensor.ndim == 2:
            tensors[name] = torch.cat([tensor, tensor[:1].expand(more, -1)])
    save_file(tensors, padded / "model.safetensors", metadata={"format": "pt"})
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": size + more}))
    manifest, rows = read_cache(build.cache(drawn, "padded-cache", teacher=padded, allow_teacher_mismatch=True))
    assert manifest.vocab_size == size + more
    assert rows.columns["topk_ids"].max() < inspect_model(padded).tokens
    # the padding's share of the softmax is the teacher's own: it is part of what the teacher says
    assert (rows.columns["teacher_logprobs"] <= read_cache(finished)[1].columns["teacher_logprobs"] + 1e-4).all()
    assert verified(build.root / "padded-cache", rescorer(padded)).problems == []


def test_two_caches_of_one_teacher_and_student_become_one(build, cache, tmp_path):
    seven = Context(build.recipe.runtime.model_copy(update={"seed": 7}), build.recipe.prompting)
    second = build.cache(build.rollouts("more", context=seven), "second")
    manifest = merged(tmp_path / "both", [cache, second])
    assert manifest.rows == 80
    assert verified(tmp_path / "both").problems == []
    rows = read_cache(tmp_path / "both")[1]
    assert np.array_equal(rows.slice(0, 40).response_ids, read_cache(cache)[1].response_ids)
    assert {parent.role for parent in read_lineage(tmp_path / "both").parents} == {"teacher", "student", "cache"}
    build.distilled(tmp_path / "both", "model")


def test_caches_that_do_not_belong_together_are_not_merged(build, drawn, cache, tmp_path):
    other = build.cache(drawn, "other", teacher=EXAMPLE / "teacher_other_style", allow_teacher_mismatch=True)
    with pytest.raises(ConsistencyError, match="teacher_mismatch"):
        merged(tmp_path / "both", [cache, other])
    with pytest.raises(ConsistencyError, match=r"caches_differ.*topk"):
        merged(tmp_path / "both", [cache, build.cache(drawn, "narrow", recipe=build.scoring(topk=0))])
    with pytest.raises(ArgumentError, match="two or more"):
        merged(tmp_path / "both", [cache])
    assert not (tmp_path / "both").exists()


def authors_row(tokens: list[int], scores: list[float], mask: list[int] | None = None) -> dict:
    metadata = {"response_tokens": tokens, "loss_mask": mask or [1] * len(tokens), "teacher_log_probs": scores}
    return {"prompt": "1+1=?", "metadata": metadata}


def test_the_authors_file_becomes_a_cache_that_says_what_it_lacks(build, tmp_path):
    rows = [
        authors_row([5, 6, 7], [-0.1, -0.2, -0.3]),
        authors_row([5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4], [1, 1, 0, 0]),
        authors_row([5, 6], [-0.1]),
        authors_row([5, 6], [-0.1, 0.7]),
        authors_row([5, 6, 7], [-0.1, -0.2, -0.3], [1, 0, 1]),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "authors.parquet")
    given = {"student": build.student, "teacher_name": "teacher"}
    manifest = converted(tmp_path / "authors.parquet", tmp_path / "cache", **given)
    assert manifest.lacks[0] == "EOS"
    assert "behaviour_logprobs" in manifest.lacks
    shown = "\n".join(manifest_lines(manifest))
    assert "lacks: EOS, behaviour_logprobs, sampling, seed" in shown
    assert "temperature" not in shown
    reasons = ("lists of different length", "not a log-prob", "loss mask with holes")
    assert manifest.hygiene.quarantined == dict.fromkeys(reasons, 1)
    stored = read_cache(tmp_path / "cache")[1]
    assert [stored.response(row).tolist() for row in range(2)] == [[5, 6, 7], [5, 6]]
    assert stored.columns["teacher_logprobs"].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.1, -0.2])
    assert verified(tmp_path / "cache").problems == []
    recipe = build.recipe.distill.model_copy(update={"batch_size": 2})
    assert (build.distilled(tmp_path / "cache", "model", recipe) / "model.safetensors").exists()


def test_another_parquet_is_refused(build, tmp_path):
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"unknown_format.*text"):
        converted(tmp_path / "other.parquet", tmp_path / "cache", student=build.student, teacher_name="teacher")
