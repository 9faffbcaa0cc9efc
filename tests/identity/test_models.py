"""Identity of models from their files."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_mcp.identity.consistency import consistency, proven_claim
from opd_mcp.identity.models import (
    ModelCache,
    config_setting,
    full_weights_hash,
    identity_hash,
    inspect_model,
    is_untrained,
    weights_hash,
)
from opd_mcp.identity.safetensors import read_tensors
from opd_mcp.schemas.errors import IntegrityError, PathError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_facts_come_from_the_files(make_model):
    facts = inspect_model(make_model("teacher"))
    assert facts.identity.name == "teacher"
    assert facts.parameters == 16 * 8 + 300 * 300 + 8
    assert facts.weight_bytes == 4 * facts.parameters
    assert (facts.vocab_size, facts.tokens, facts.hidden_size, facts.layers) == (16, 7, 8, 1)
    assert facts.eos_token_ids == (1,)


def test_a_copy_is_the_same_model_under_another_name(make_model, tmp_path):
    original = make_model("teacher")
    copy = shutil.copytree(original, tmp_path / "renamed")
    first, second = inspect_model(original).identity, inspect_model(copy).identity
    assert first.name != second.name
    assert first.same_model(second)
    assert identity_hash(first) == identity_hash(second)


def test_other_weights_are_another_model(make_model):
    first, second = make_model("a", seed=1), make_model("b", seed=2)
    assert weights_hash(first) != weights_hash(second)
    assert full_weights_hash(first) != full_weights_hash(second)


def test_sharding_file_names_and_metadata_do_not_matter(make_model, tmp_path):
    original = make_model("whole")
    tensors = load_file(original / "model.safetensors")
    sharded = shutil.copytree(original, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    files = {names[0]: "model-00001-of-00002.safetensors", names[1]: "model-00002-of-00002.safetensors"}
    files[names[2]] = files[names[1]]
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, sharded / file, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert inspect_model(sharded).identity.weights == inspect_model(original).identity.weights
    assert full_weights_hash(sharded) == full_weights_hash(original)


def test_a_stored_copy_of_the_tied_output_layer_changes_nothing(make_model, tmp_path):
    original = make_model("tied")
    tensors = load_file(original / "model.safetensors")
    stored_twice = shutil.copytree(original, tmp_path / "twice")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.copy()}, stored_twice / "model.safetensors")
    assert inspect_model(stored_twice).identity.weights == inspect_model(original).identity.weights
    assert inspect_model(stored_twice).parameters == inspect_model(original).parameters
    save_file({**tensors, "lm_head.weight": embedding + 1}, stored_twice / "model.safetensors")
    assert inspect_model(stored_twice).identity.weights != inspect_model(original).identity.weights


def test_one_changed_byte_in_a_large_tensor_is_found_by_the_full_hash(make_model):
    model = make_model("teacher")
    sampled, full = weights_hash(model), full_weights_hash(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 1] += 1
    save_file(tensors, model / "model.safetensors")
    assert full_weights_hash(model) != full
    assert weights_hash(model) == sampled, "between the sampled blocks: the price of a quick look"


def test_a_training_step_on_every_value_is_found_by_the_sampled_hash(make_model):
    model = make_model("teacher")
    before = weights_hash(model)
    tensors = load_file(model / "model.safetensors")
    save_file({name: value + np.float32(1e-3) for name, value in tensors.items()}, model / "model.safetensors")
    assert weights_hash(model) != before


def test_template_tokenizer_and_eos_have_their_own_hashes(make_model):
    model = make_model("teacher")
    before = inspect_model(model).identity
    (model / "chat_template.jinja").write_text("another")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    facts = inspect_model(model)
    assert facts.eos_token_ids == (0, 1)
    assert facts.identity.chat_template != before.chat_template
    assert facts.identity.special_tokens != before.special_tokens
    assert (facts.identity.weights, facts.identity.tokenizer) == (before.weights, before.tokenizer)


def test_a_hub_snapshot_is_named_by_its_hub_id(make_model):
    assert inspect_model(make_model("models--Qwen--Qwen3-0.6B/snapshots/0a1b")).identity.name == "Qwen/Qwen3-0.6B"


def test_a_hub_repository_with_its_links_and_a_local_copy_are_one_identity(make_model, tmp_path):
    local = make_model("my-teacher")
    hub = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    snapshot = hub / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(local.iterdir())):
        shutil.copy(file, hub / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    ours, theirs = inspect_model(local).identity, inspect_model(snapshot).identity
    assert (ours.name, theirs.name) == ("my-teacher", "Qwen/Qwen3-0.6B")
    assert identity_hash(ours) == identity_hash(theirs)
    assert consistency(ours, proven_claim(theirs), allowed=False).status == "consistent"
    assert full_weights_hash(local) == full_weights_hash(snapshot)


def test_the_cache_forgets_a_model_whose_files_change(make_model):
    model, cache = make_model("teacher", seed=1), ModelCache()
    first = cache.inspect_model(model)
    assert cache.inspect_model(model) is first
    shutil.copy(make_model("other", seed=2) / "model.safetensors", model / "model.safetensors")
    assert not cache.inspect_model(model).identity.same_model(first.identity)


@pytest.mark.parametrize(
    ("missing", "code"),
    [("config.json", "not_a_model"), ("model.safetensors", "not_a_model"), ("tokenizer.json", "not_a_model")],
)
def test_a_missing_file_is_named(make_model, missing, code):
    model = make_model("teacher")
    (model / missing).unlink()
    with pytest.raises(PathError, match=missing.split(".")[-1]) as caught:
        inspect_model(model)
    assert caught.value.code == code


def test_a_missing_directory_is_not_found(tmp_path):
    with pytest.raises(PathError) as caught:
        inspect_model(tmp_path / "nothing")
    assert caught.value.code == "not_found"


def test_pickled_weights_are_refused_unread(make_model):
    model = make_model("teacher")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PathError, match=r"pytorch_model\.bin") as caught:
        inspect_model(model)
    assert caught.value.code == "unsafe_weights"


def test_an_adapter_is_not_a_model(make_model):
    model = make_model("adapter")
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(PathError, match="LoRA adapter"):
        inspect_model(model)


def header_of(entry: object) -> bytes:
    text = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        header_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
        header_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header_of({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}) + bytes(8),
        header_of({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + bytes(8),
        header_of("text"),
    ],
)
def test_a_damaged_safetensors_file_is_named(make_model, content):
    model = make_model("teacher")
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors") as caught:
        inspect_model(model)
    assert caught.value.code == "damaged_file"


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "missing.safetensors", "weights.bin"])
def test_a_weight_index_names_only_files_beside_it(make_model, shard):
    model = make_model("teacher")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(IntegrityError, match=shard):
        inspect_model(model)


def test_a_model_under_a_link_is_the_model(make_model, tmp_path: Path):
    model = make_model("teacher")
    (tmp_path / "link").symlink_to(model)
    assert inspect_model(tmp_path / "link").identity == inspect_model(model).identity


def test_what_is_hashed_is_what_is_loaded_where_there_is_an_index_too(make_model):
    model, other = make_model("teacher", seed=1), make_model("other", seed=2)
    alone = inspect_model(model).identity
    shutil.copy(other / "model.safetensors", model / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect_model(model).identity.same_model(alone)


def test_a_model_is_untrained_while_every_norm_is_as_initialised(tmp_path):
    student = EXAMPLES / "arithmetic" / "student"
    assert is_untrained(student)
    assert not is_untrained(EXAMPLES / "arithmetic" / "teacher")
    [norm] = [tensor for tensor in read_tensors(student) if tensor.name == "model.norm.weight"]
    changed = Path(shutil.copytree(student, tmp_path / "changed"))
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[norm.begin] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    assert not is_untrained(changed)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, 2),
        ({"sliding_window_pattern": 6, "num_hidden_layers": 26}, 22),
        ({"model_type": "mistral", "num_hidden_layers": 3}, 3),
        ({"model_type": "mistral", "num_hidden_layers": 3, "sliding_window": None}, None),
        ({"layer_types": ["sliding_attention"], "use_sliding_window": False}, None),
        ({"sliding_window_pattern": "6", "num_hidden_layers": 26}, None),
        ({"num_hidden_layers": 26}, None),
    ],
)
def test_layers_that_see_a_window_are_counted_where_the_config_says_which(settings, layers):
    config = {"sliding_window": 512, **settings}
    assert config_setting(config, "windowed_layers") == layers
    assert config_setting({"text_config": config}, "windowed_layers") == layers
