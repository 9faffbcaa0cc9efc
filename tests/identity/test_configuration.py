"""A configuration in its normal form: spellings that compute the same are one, settings that compute otherwise not."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from opd_mcp.identity.configuration import (
    DECIDES_NOTHING,
    DEFAULTS_FILE,
    configuration_hash,
    normal_configuration,
    require_own_files,
)
from opd_mcp.identity.models import inspect_model
from opd_mcp.schemas.errors import PathError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
DEFAULTS = json.loads(DEFAULTS_FILE.read_text())
# Qwen3-0.6B as it lies on the Hub, written by transformers 4.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Llama-3.2-1B, whose rotary positions are scaled.
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def saved_again(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the installed transformers writes it after reading it."""
    from transformers import AutoConfig

    given = {name: value for name, value in copy.deepcopy(config).items() if name != "model_type"}
    written: dict[str, Any] = json.loads(AutoConfig.for_model(config["model_type"], **given).to_json_string())
    return written


@pytest.mark.parametrize("config", [QWEN3, LLAMA3], ids=["qwen3", "llama3"])
def test_a_model_of_the_hub_that_is_saved_again_is_the_same(config):
    again = saved_again(config)
    assert again != config
    assert "rope_theta" not in again
    assert normal_configuration(again) == normal_configuration(config)
    assert configuration_hash(again) == configuration_hash(config)


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_written_defaults_are_absent_defaults(family):
    assert configuration_hash(saved_again({"model_type": family})) == configuration_hash({"model_type": family})


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_the_table_says_what_transformers_fills_in(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    told = {name: value for name, value in DEFAULTS[family].items() if name != "rope_theta"}
    assert {name: known[name] for name in told} == told
    assert DEFAULTS[family]["rope_theta"] == kind.default_theta


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 128},
        {"num_key_value_heads": 16},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "qwen2"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_computation_decides_the_hash(change):
    assert configuration_hash({**QWEN3, **change}) != configuration_hash(QWEN3)


def test_what_decides_nothing_is_left_out():
    changed = {**QWEN3, **dict.fromkeys(DECIDES_NOTHING, "something else"), "_name_or_path": "/home/me/copy"}
    assert configuration_hash(changed) == configuration_hash(QWEN3)
    reordered = dict(reversed(QWEN3.items()))
    assert configuration_hash(reordered) == configuration_hash(QWEN3)


def test_null_is_not_absent_where_the_class_has_a_default():
    assert configuration_hash({"model_type": "mistral", "sliding_window": None}) != configuration_hash(
        {"model_type": "mistral"}
    )
    assert configuration_hash({"model_type": "unknown", "window": None}) != configuration_hash(
        {"model_type": "unknown"}
    )


def test_the_configuration_within_a_configuration_counts_and_is_brought_to_the_same_form():
    outer = {"model_type": "a", "text_config": {**QWEN3, "torch_dtype": "float16"}}
    assert configuration_hash(outer) == configuration_hash({"model_type": "a", "text_config": saved_again(QWEN3)})
    other = {"model_type": "a", "text_config": {**QWEN3, "rms_norm_eps": 1e-3}}
    assert configuration_hash(outer) != configuration_hash(other)


@pytest.mark.parametrize(
    "text",
    [
        '{"rope_theta": NaN}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"rope_scaling": [1]}',
        '{"rope_parameters": "x"}',
        '{"model_type": "qwen3", "num_hidden_layers": 1e9}',
        '{"model_type": [1]}',
        '{"rope_scaling": {"a": {"type": []}}}',
        '{"rope_scaling": {"type": []}}',
    ],
)
def test_odd_values_have_a_hash(text):
    assert len(configuration_hash(json.loads(text))) == 64


@pytest.mark.parametrize(
    "config",
    [
        {"transformers_weights": "../other.safetensors"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"configuration_files": ["../../config.0.0.0.json"]},
        {"attn_implementation": "somebody/kernel"},
        {"vision_config": {"use_pretrained_backbone": True}},
        {"parts": [{"experts_implementation": "somebody/experts"}]},
    ],
)
def test_configurations_that_name_other_files_are_refused(tmp_path, config):
    with pytest.raises(PathError) as caught:
        require_own_files(config, tmp_path)
    assert caught.value.code == "unsafe_config"


def test_the_models_of_the_examples_keep_their_configuration_when_they_are_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "student")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_bytes((EXAMPLES / "student" / file).read_bytes())
    model.save_pretrained(tmp_path)
    before, after = inspect_model(EXAMPLES / "student").identity, inspect_model(tmp_path).identity
    assert before.differences(after) == set()


def test_a_copy_with_other_settings_is_another_model(make_model):
    one, two = make_model("one"), make_model("two")
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "rope_theta": 77}))
    first, second = inspect_model(one).identity, inspect_model(two).identity
    assert first.weights == second.weights
    assert not first.same_model(second)
    assert first.differences(second) == {"configuration"}
    assert first.label() != second.label().replace("two", "one")


def test_an_identity_of_an_earlier_version_is_compared_by_what_it_has(make_model):
    now = inspect_model(make_model("one")).identity
    earlier = now.model_copy(update={"configuration": None, "encoding": None})
    assert type(now).from_json(earlier.to_json()) == earlier
    assert earlier.same_model(now)
    assert now.same_model(earlier)
    assert "+" not in earlier.label()
    other = inspect_model(make_model("other", seed=1)).identity
    assert not earlier.same_model(other)
