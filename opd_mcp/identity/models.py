"""What a model directory holds, by its files alone: identity, size, vocabulary, EOS ids; no torch, no loading."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from opd_mcp.identity import encoding, tokenizers
from opd_mcp.identity.adapters import AdapterFiles, is_adapter, read_adapter, unsupported_adapter
from opd_mcp.identity.configuration import configuration_hash, require_own_files
from opd_mcp.identity.files import path_signature, read_json_object
from opd_mcp.identity.safetensors import Tensor, full_digest, read_tensors, sampled_digest
from opd_mcp.schemas.base import content_hash
from opd_mcp.schemas.errors import PathError
from opd_mcp.schemas.identity import BaseForm, ModelIdentity, Quantization

# Beyond any size of a model, so that no estimate overflows.
MAX_SETTING = 1 << 31
# Classes that keep their state where a generator cannot reach it, by model_type; others are tried when they are loaded.
UNDECODABLE = {
    "rwkv": "its state takes in the padding of shorter prompts",
    "xlstm": "its state is in a cache of its own",
    "minimax": "its state is in a cache of its own",
    "recurrent_gemma": "its state stays in its layers, whichever rows are decoded",
    "openai-gpt": "it takes no cache",
    "cpmant": "it takes no left-padded batch",
}
NORM = re.compile(r"(norm|ln_\w+)\.weight$")
# The number 1 as safetensors stores it.
ONE_BYTES = {"F32": b"\x00\x00\x80?", "BF16": b"\x80?", "F16": b"\x00<"}
HUB_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/[^/]+$")


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it; `parameters` counts a tied output layer once, `tokens` are ids in use.

    Of an `adapter` the sizes include its base, whose configuration it has.
    `unused` says what the directory holds that other programs would load for its tokenizer, and this one does not.
    """

    path: Path
    identity: ModelIdentity
    parameters: int
    weight_bytes: int
    config: dict[str, Any]
    vocab_size: int
    tokens: int
    eos_token_ids: tuple[int, ...]
    unused: tuple[str, ...] = ()
    adapter: AdapterFiles | None = None

    @property
    def weights_path(self) -> Path:
        """The directory of the whole weights: an adapter's base, else the model's own."""
        return self.path if self.adapter is None else self.adapter.base_directory()

    def setting(self, name: str) -> int | None:
        """An integer of the (text) config, e.g. `hidden_size`; None when absent."""
        return config_setting(self.config, name)

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream."""
        return self.setting("hidden_size")

    @property
    def positions(self) -> int | None:
        """The positions that the model was made for, with what its RoPE scaling adds."""
        own, config = self.setting("max_position_embeddings"), _text_config(self.config)
        rope = config.get("rope_scaling") or config.get("rope_parameters")
        if own is None or not isinstance(rope, dict):
            return own
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", own)
        if not isinstance(factor, int | float) or not isinstance(original, int) or not 1 <= factor <= 1e6:
            return own
        return max(own, int(factor * original))

    @property
    def layers(self) -> int | None:
        """Number of transformer layers."""
        return self.setting("num_hidden_layers")


@dataclass
class ModelCache:
    """Facts of models already looked at, forgotten as soon as a file of the directory changes."""

    _facts: dict[tuple[str, str], ModelFacts] = field(default_factory=dict)

    def inspect_model(self, path: Path) -> ModelFacts:
        """As `inspect_model`, at the cost of a directory listing when nothing has changed."""
        signature = path_signature(path)
        if is_adapter(path):
            signature += path_signature(read_adapter(path).base_directory())
        key = (str(path), signature)
        if key not in self._facts:
            for stale in [other for other in self._facts if other[0] == key[0]]:
                del self._facts[stale]
            self._facts[key] = inspect_model(path)
        return self._facts[key]


def inspect_model(path: Path, *, name: str | None = None, form: BaseForm = "as_saved") -> ModelFacts:
    """The facts of a model directory, read from its JSON files and safetensors headers.

    `name` replaces the name that the directory suggests; `form` says how its linear layers are held. Raises PathError
    (`not_found`, `not_a_model`, `unsafe_weights`, `unsafe_config`) and IntegrityError `damaged_file`.
    """
    adapter = read_adapter(path) if is_adapter(path) else None
    base = None if adapter is None else _inspect_base(adapter)
    config = _model_config(path) if base is None else base.config
    encoding.require_own_tokenizer(path)
    tensors, weights = _hashed_tensors(path, sampled_digest)
    quantization = held_quantization(adapter, form)
    if adapter is not None and base is not None:
        weights = _joined_hash(adapter, weights, _held_hash(base.identity.weights, quantization))
    else:
        weights = _held_hash(weights, quantization)
    content = tokenizers.tokenizer_content(path)
    tokens = tokenizers.tokens_of(content, path / tokenizers.TOKENIZER_FILE)
    eos = tokenizers.eos_token_ids(path, tokens)
    template = tokenizers.chat_template(path)
    identity = ModelIdentity(
        name=name or model_name(path),
        weights=weights,
        configuration=configuration_hash(config),
        tokenizer=tokenizers.token_map_hash(tokens),
        encoding=encoding.encoding_hash(content, encoding.special_tokens(path, tokens)),
        chat_template=None if template is None else text_hash(template),
        special_tokens=tokenizers.special_tokens_hash(eos, tokenizers.special_token_names(path)),
        quantization=quantization,
    )
    vocab_size = _text_config(config).get("vocab_size")
    return ModelFacts(
        path=path,
        identity=identity,
        parameters=sum(tensor.elements for tensor in tensors) + (base.parameters if base else 0),
        weight_bytes=sum(tensor.bytes for tensor in tensors) + (base.weight_bytes if base else 0),
        config=config,
        vocab_size=vocab_size if is_size(vocab_size) else max(tokens, default=-1) + 1,
        tokens=max(tokens, default=-1) + 1,
        eos_token_ids=eos,
        unused=encoding.unused_parts(path, tokens),
        adapter=adapter,
    )


def _inspect_base(adapter: AdapterFiles) -> "ModelFacts":
    """The facts of an adapter's base, which is a whole model."""
    directory = adapter.base_directory()
    if is_adapter(directory):
        raise unsupported_adapter(adapter.path, f"its base, {directory.name}, is an adapter as well")
    return inspect_model(directory)


def held_quantization(adapter: AdapterFiles | None, form: BaseForm) -> Quantization | None:
    """What a model's linear layers, or those of an adapter's base, are quantised to when it is loaded in this form."""
    if form == "as_saved":
        return adapter.quantization if adapter else None
    return None if form == "plain" else form


def _held_hash(weights: str, quantization: Quantization | None) -> str:
    """The hash of a model whose linear layers are quantised and dequantised again."""
    return weights if quantization is None else content_hash({"weights": weights, "quantization": quantization})


def _joined_hash(adapter: AdapterFiles, weights: str, base: str) -> str:
    """The hash of a frozen model and the product that is added to it."""
    return content_hash({"base": base, "adapter": weights, "scale": adapter.scale})


def require_decodable(facts: ModelFacts) -> None:
    """Raise PathError `unsupported_model` for a class, known by its model_type, that cannot generate here."""
    known = UNDECODABLE.get(str(_text_config(facts.config).get("model_type") or facts.config.get("model_type")))
    if known is not None:
        raise undecodable(facts, known)


def undecodable(facts: ModelFacts, why: str) -> PathError:
    """The error for a class whose responses could not be trusted."""
    return PathError(
        "unsupported_model",
        f"Models of type {facts.config.get('model_type')!r} cannot generate here: {why}.",
        value=facts.path,
        fix="Give a model of another architecture; docs/data.md lists those that were tried. As the teacher "
        "of a teacher cache, which only scores, this one can be used.",
    )


def config_setting(config: dict[str, Any], name: str) -> int | None:
    """An integer of the (text) config, e.g. `hidden_size`, or the number of `windowed_layers`; None when absent."""
    text = _text_config(config)
    value = _windowed_layers(text) if name == "windowed_layers" else text.get(name)
    return value if is_size(value) else None


def _windowed_layers(config: dict[str, Any]) -> int | None:
    """How many layers see a window only, where the config says which; else None."""
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if not is_size(config.get("sliding_window")) or config.get("use_sliding_window") is False:
        return None
    if isinstance(kinds, list):
        return kinds.count("sliding_attention")
    every = config.get("sliding_window_pattern")
    if not is_size(layers):
        return None
    if config.get("model_type") == "mistral":
        return layers
    # Gemma 3 before transformers wrote the kinds: each so many-th layer sees everything
    return layers - layers // every if is_size(every) and every > 0 else None


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a config's value can be the size of anything."""
    return type(value) is int and 0 <= value < MAX_SETTING


def weights_hash(path: Path) -> str:
    """The hash over tensor names, dtypes, shapes and sampled bytes of a directory's own weights."""
    return _hashed_tensors(path, sampled_digest)[1]


def full_weights_hash(path: Path, form: BaseForm = "as_saved") -> str:
    """The hash over every byte of a model's weights, read in pieces; raises as `read_tensors`."""
    weights = _hashed_tensors(path, full_digest)[1]
    if not is_adapter(path):
        return _held_hash(weights, held_quantization(None, form))
    adapter = read_adapter(path)
    base = _held_hash(full_weights_hash(adapter.base_directory()), held_quantization(adapter, form))
    return _joined_hash(adapter, weights, base)


def is_untrained(path: Path) -> bool:
    """Whether a whole model's norm weights are all as they are initialised, 1 or 0: no training leaves them so."""
    norms = [tensor for tensor in read_tensors(path) if NORM.search(tensor.name) and len(tensor.shape) == 1]
    return bool(norms) and all(_is_initial(tensor) for tensor in norms)


def _is_initial(norm: Tensor) -> bool:
    with norm.file.open("rb") as file:
        content = os.pread(file.fileno(), norm.bytes, norm.begin)
    one = ONE_BYTES.get(norm.dtype)
    return one is not None and content in (one * norm.elements, bytes(norm.bytes))


def identity_hash(identity: ModelIdentity) -> str:
    """sha256 (hex) of what makes a model itself, its name left out; the part of a model in a phase's key."""
    return content_hash(identity.model_copy(update={"name": "", "weights_full": None}).to_dict())


def model_name(path: Path) -> str:
    """The name that a directory suggests: `org/name` in a Hub cache, else the directory's own."""
    match = HUB_SNAPSHOT.search(path.absolute().as_posix())
    return match["id"].replace("--", "/") if match else path.resolve().name


def text_hash(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _model_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise PathError("not_found", "There is no such directory.", value=path, fix="Give a model's directory.")
    if not (path / "config.json").is_file():
        raise PathError(
            "not_a_model",
            "This directory has no config.json.",
            value=path,
            fix="Give a directory with config.json, tokenizer.json and safetensors weights.",
        )
    config = read_json_object(path / "config.json")
    require_own_files(config, path)
    return config


def _hashed_tensors(path: Path, tensor_digest: Callable[[Tensor], str]) -> tuple[list[Tensor], str]:
    tensors = read_tensors(path)
    digests = {tensor.name: tensor_digest(tensor) for tensor in tensors}
    # Some checkpoints store a tied output layer a second time, and saving the loaded model drops it:
    # with or without the copy it is the same model.
    inputs = [name for name in digests if name.endswith("embed_tokens.weight")]
    copies = {name for name in digests if name.endswith("lm_head.weight")}
    copies = {name for name in copies if any(digests[name] == digests[other] for other in inputs)}
    kept = [tensor for tensor in tensors if tensor.name not in copies]
    return kept, content_hash([[ascii(tensor.name), digests[tensor.name]] for tensor in kept])


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config
