"""JSON inputs have the size that their kind can have; what is beyond it is refused before it costs anything."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from opd_mcp.identity.files import MAX_CONFIG_BYTES, MAX_JSON_DEPTH, read_json_object
from opd_mcp.identity.lineage import MAX_LINEAGE_BYTES, read_lineage
from opd_mcp.identity.models import inspect_model
from opd_mcp.identity.safetensors import MAX_INDEX_BYTES, MAX_TENSORS, read_tensors
from opd_mcp.identity.tokenizers import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_CONFIG_BYTES, token_map
from opd_mcp.schemas.errors import IntegrityError


def padded(file, size):
    """The JSON object of a file with a text that makes it larger than `size`."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, "padding": "x" * size}))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", MAX_CONFIG_BYTES),
        ("generation_config.json", MAX_CONFIG_BYTES),
        ("tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES),
        ("special_tokens_map.json", MAX_CONFIG_BYTES),
        ("tokenizer.json", MAX_TOKENIZER_BYTES),
    ],
)
def test_each_file_of_a_model_has_its_own_limit(make_model, name, limit):
    model = make_model("large")
    padded(model / name, limit // 2)
    inspect_model(model)
    padded(model / name, limit)
    with pytest.raises(IntegrityError, match=f"{name}.*more than {limit} bytes") as caught:
        inspect_model(model)
    assert caught.value.code == "damaged_file"


def test_a_config_of_hundreds_of_megabytes_is_not_read(make_model):
    model = make_model("huge")
    with (model / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="more than"):
        inspect_model(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MAX_CONFIG_BYTES


def test_an_index_and_a_lineage_have_limits(make_model):
    model = make_model("sharded")
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert len(read_tensors(model)) == 3
    padded(index, MAX_INDEX_BYTES)
    with pytest.raises(IntegrityError, match="more than"):
        read_tensors(model)
    with (model / "lineage.json").open("wb") as file:
        file.truncate(MAX_LINEAGE_BYTES + 1)
    with pytest.raises(IntegrityError, match="more than"):
        read_lineage(model)


@pytest.mark.parametrize("key", ["data_offsets", "data_\\u006fffsets"])
def test_a_header_of_a_million_empty_tensors_is_refused_by_its_count(tmp_path, key):
    entries = ",".join(f'"t{n}":{{"dtype":"F32","shape":[0],"{key}":[0,0]}}' for n in range(1_000_000))
    header = ("{" + entries + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(IntegrityError, match=f"more than {MAX_TENSORS} tensors|length is wrong"):
        read_tensors(tmp_path)


def test_the_tensors_of_all_files_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_mcp.identity.safetensors.MAX_TENSORS", 3)
    for part in range(2):
        save_file({f"{part}.{n}": np.zeros(1) for n in range(2)}, tmp_path / f"part{part}.safetensors")
    with pytest.raises(IntegrityError, match="more than 3 tensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("opening", ['{"a":', "["], ids=["objects", "lists"])
def test_nesting_is_bounded(tmp_path, opening):
    closing = "}" if opening.startswith("{") else "]"
    for depth, fits in ((MAX_JSON_DEPTH - 2, True), (MAX_JSON_DEPTH + 1, False), (100_000, False)):
        (tmp_path / "a.json").write_text('{"x":' + opening * depth + "1" + closing * depth + "}")
        if fits:
            read_json_object(tmp_path / "a.json", 1 << 20)
            continue
        with pytest.raises(IntegrityError, match=r"a\.json"):
            read_json_object(tmp_path / "a.json", 1 << 20)


def test_a_tokenizer_nested_without_end_is_damage(make_model):
    model = make_model("nested")
    content = json.loads((model / "tokenizer.json").read_text())
    text = json.dumps({**content, "normalizer": 0}).replace(
        '"normalizer": 0', '"normalizer": ' + '{"normalizers":[' * 500 + "1" + "]}" * 500
    )
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(IntegrityError, match="nested"):
        token_map(model)
