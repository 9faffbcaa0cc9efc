"""What a model computes apart from its weights: `config.json` in a normal form, its hash, and what it must not name.

Two spellings of one configuration have one hash: keys in any order, whole numbers as integers or floats, the rotary
settings of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`), and, for the families of
`config_defaults.json`, defaults written out or left out. For other families a written default is another hash: a copy
that was saved again counts as another model rather than another model as this one.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from opd_mcp.schemas.errors import PathError

DEFAULTS_FILE = Path(__file__).with_name("config_defaults.json")
DECIDES_NOTHING = frozenset(
    {
        # how the file was written, and as what the weights are stored, which their own hash says
        *("transformers_version", "torch_dtype", "dtype", "auto_map", "tokenizer_class", "processor_class"),
        # the class follows from model_type; for causal models transformers asks nothing else
        "architectures",
        # what a call returns, and how it keeps keys and values
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript"),
        # how weights that are not in the files would be drawn: all are in the files
        *("initializer_range", "initializer_factor"),
        # stop tokens have a hash of their own, and the tokenizer writes the others
        *("eos_token_id", "bos_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        # heads for other tasks
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        # settings of a generator that is not this project's
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "diversity_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "output_scores", "return_dict_in_generate"),
    }
)
"""Besides these, keys that begin with an underscore."""
# What every class of transformers has, and saves only where it is another value.
COMMON_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pad_token_id": None,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
}
LENGTH_SCALED = ("llama3", "longrope", "yarn")
# Keys that make a loader open other files than those that are hashed, by what they name.
OTHER_FILES = {
    "transformers_weights": "its own file of weights",
    "configuration_files": "another file of configuration",
    "use_pretrained_backbone": "a backbone to fetch",
}


def configuration_hash(config: dict[str, Any]) -> str:
    """sha256 (hex) of a configuration's normal form."""
    text = json.dumps(normal_configuration(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def normal_configuration(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json that decide what the model computes, in one spelling; nested ones alike."""
    kept = {name: value for name, value in config.items() if not _decides_nothing(name)}
    model_type = kept.get("model_type")
    family = _defaults().get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        kept = _with_derived(str(model_type), {**family, **kept})
    kept = _with_rotary(kept)
    normal = {name: _normal_value(value, name) for name, value in kept.items()}
    absent = {name for name, value in normal.items() if family is not None and value is None}
    common = {name for name, value in normal.items() if name in COMMON_DEFAULTS and value == COMMON_DEFAULTS[name]}
    return {name: value for name, value in normal.items() if name not in absent | common}


def require_own_files(config: dict[str, Any], path: Path) -> None:
    """Raise PathError `unsafe_config` for a configuration that names code or files which were not hashed."""
    for name, value in _settings(config):
        named = OTHER_FILES.get(name)
        if named is not None and value is not None and value is not False:
            raise PathError(
                "unsafe_config",
                f"config.json names {named}.",
                value=f"{name}: {value}",
                fix=f"Remove {name} from config.json; the weights are read from model.safetensors.",
            )
        if name.endswith("_implementation") and "/" in str(value):  # code that loading would fetch from the Hub
            raise PathError(
                "unsafe_config",
                f"config.json names code to fetch for {name}.",
                value=str(value),
                fix=f"Remove {name} from config.json.",
            )


def _decides_nothing(name: str) -> bool:
    return name in DECIDES_NOTHING or name.startswith("_")


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(DEFAULTS_FILE.read_text(encoding="utf-8"))
    return loaded


def _with_derived(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the family's class computes from other settings where it is absent or null."""
    config = dict(config)
    heads, width, layers = (config.get(n) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None and _whole(heads) and _whole(width):
        config["head_dim"] = width // heads
    if "use_sliding_window" in config and not config["use_sliding_window"]:
        config["sliding_window"] = None
    if "mlp_only_layers" in config and config["mlp_only_layers"] is None:
        config["mlp_only_layers"] = []
    if "num_experts" in config and config["num_experts"] == config.get("num_local_experts"):
        del config["num_local_experts"]  # newer versions write both names
    if "layer_types" in config and config["layer_types"] is None and _whole(layers) and layers <= 4096:
        slides = [_slides(model_type, config, layer) for layer in range(layers)]
        config["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    return config


def _slides(model_type: str, config: dict[str, Any], layer: int) -> bool:
    if model_type == "gemma2":
        return layer % 2 == 0
    first = config.get("max_window_layers")
    return config.get("sliding_window") is not None and _whole(first) and layer >= first


def _with_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings under `rope_parameters` alone, as transformers 5 understands the older keys."""
    if not config.keys() & {"rope_theta", "rope_scaling", "rope_parameters"}:
        return config
    config = dict(config)
    theta, scaling, partial = (config.pop(n, None) for n in ("rope_theta", "rope_scaling", "partial_rotary_factor"))
    given = scaling or config.pop("rope_parameters", None) or {}
    config.pop("rope_parameters", None)
    if not isinstance(given, dict):
        return {**config, "rope_parameters": given, "rope_theta": theta}
    nested = {name: value for name, value in given.items() if isinstance(value, dict)}
    parts = {name: _rotary(value, theta, partial, config) for name, value in nested.items()}
    whole = parts or _rotary(given, theta, partial, config)
    return {**config, "rope_parameters": whole}


def _rotary(given: dict[str, Any], theta: Any, partial: Any, config: dict[str, Any]) -> dict[str, Any]:
    part = {name: value for name, value in given.items() if name != "type"}
    part.setdefault("rope_type", given.get("type", "default"))
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if value is not None:
            part.setdefault(name, value)
    if part["rope_type"] in LENGTH_SCALED:
        outer = config.get("original_max_position_embeddings")
        length = part.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        part["original_max_position_embeddings"] = length if outer is None else outer
    return {name: value for name, value in part.items() if value is not None}


def _normal_value(value: Any, name: str = "") -> Any:
    # Only a configuration within the configuration has keys that decide nothing; quantization decides it all.
    if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
        return normal_configuration(value)
    if isinstance(value, dict):
        return {key: _normal_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normal_value(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    for name, value in config.items():
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _settings(inner)


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0
