"""Lineage files: written, read, proven and refused."""

import json

import pytest

from opd_mcp.identity.lineage import data_hashes, read_lineage, verified_lineage, write_lineage
from opd_mcp.identity.models import full_weights_hash, inspect_model
from opd_mcp.schemas.errors import IntegrityError
from opd_mcp.schemas.identity import Lineage


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"rows")
    files = data_hashes(tmp_path, ["manifest.json", "shards/00000.parquet"])
    write_lineage(tmp_path, Lineage(kind="cache", stage="score", recipe={"score": {"topk": 8}}, files=files))
    return tmp_path


def test_what_was_written_is_read_and_proven(cache):
    assert read_lineage(cache) == verified_lineage(cache)
    assert sorted(p.name for p in cache.iterdir()) == ["lineage.json", "manifest.json", "shards"]


def test_a_directory_without_lineage_has_none(tmp_path):
    assert read_lineage(tmp_path) is None
    assert verified_lineage(tmp_path) is None


def test_a_tampered_shard_is_named(cache):
    (cache / "shards" / "00000.parquet").write_bytes(b"r0ws")
    with pytest.raises(IntegrityError, match=r"shards/00000\.parquet") as caught:
        verified_lineage(cache)
    assert caught.value.code == "lineage_mismatch"


def test_a_missing_file_is_named(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifest\.json is missing"):
        verified_lineage(cache)


@pytest.mark.parametrize("name", ["a" * 5000, "b/" * 3 + "c" * 300, "nul\x00"])
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path, name):
    write_lineage(tmp_path, Lineage(kind="cache", stage="score", recipe={}, files={name: "0" * 64}))
    with pytest.raises(IntegrityError, match=r"lineage_mismatch|damaged_file"):
        verified_lineage(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_lineage_never_leads_out_of_its_directory(tmp_path, name):
    write_lineage(tmp_path, Lineage(kind="cache", stage="score", recipe={}, files={name: "0"}))
    with pytest.raises(IntegrityError, match="outside"):
        verified_lineage(tmp_path)


def test_a_lineage_that_names_nothing_proves_nothing(tmp_path):
    write_lineage(tmp_path, Lineage(kind="responses", stage="responses", recipe={}))
    with pytest.raises(IntegrityError, match="could prove it"):
        verified_lineage(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}'])
def test_a_damaged_lineage_is_an_error_not_an_absence(tmp_path, text):
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(IntegrityError) as caught:
        read_lineage(tmp_path)
    assert caught.value.code == "damaged_file"


@pytest.mark.parametrize(
    ("file", "what"),
    [("chat_template.jinja", "chat template"), ("tokenizer_config.json", "special tokens")],
)
def test_a_changed_model_file_is_named(make_model, file, what):
    model = make_model("student")
    write_lineage(model, Lineage(kind="model", stage="sft", recipe={}, model=inspect_model(model).identity))
    content = {"eos_token": "="} if file.endswith(".json") else "changed"
    (model / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(IntegrityError, match=what):
        verified_lineage(model)


def test_a_change_between_the_sampled_bytes_is_found_on_request(make_model):
    model = make_model("student")
    identity = inspect_model(model).identity.model_copy(update={"weights_full": full_weights_hash(model)})
    write_lineage(model, Lineage(kind="model", stage="sft", recipe={}, model=identity))
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 + 1000] ^= 1
    weights.write_bytes(content)
    assert verified_lineage(model) is not None
    with pytest.raises(IntegrityError, match="weights"):
        verified_lineage(model, full=True)
