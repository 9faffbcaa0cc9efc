"""How a model directory turns text into ids: what of its tokenizer files is used, one hash over it, what is not used.

A tokenizer is built from `tokenizer.json`, the names of its special tokens and one chat template, and from nothing
else (`engine/models/loading.py`); `tokenizers.py` has the hashes of the id → token map, the template and the names.
Whatever else a directory holds that transformers would follow on its own is refused, or left unused and named.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_mcp.identity import tokenizers
from opd_mcp.schemas.errors import PathError

LEGACY_NAMES_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
EXTRA_TEMPLATES = "additional_chat_templates"
# Limits of a batch, not of what a text means.
BATCH_SETTINGS = frozenset({"version", "truncation", "padding"})
MODEL_DEFAULTS: dict[str, Any] = {
    "byte_fallback": False,
    "continuing_subword_prefix": "",
    "dropout": None,
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "ignore_merges": False,
    "unk_token": None,
}
TOKEN_FLAGS: dict[str, Any] = {
    "lstrip": False,
    "normalized": True,
    "rstrip": False,
    "single_word": False,
    "special": False,
}


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, all of them in its id → token map, and how it decodes.

    `names` are those with a name, e.g. {"eos_token": "<eos>"}, as a chat template sees them; `extra` have none.
    """

    names: dict[str, str]
    extra: tuple[str, ...]
    clean_up_spaces: bool
    split: bool


def special_tokens(path: Path, tokens: dict[int, str]) -> SpecialTokens:
    """What `tokenizer_config.json`, or the older `special_tokens_map.json`, says of special tokens in the map."""
    config = tokenizers.tokenizer_config(path)
    older = {} if "added_tokens_decoder" in config else tokenizers.optional_json(path / LEGACY_NAMES_FILE)
    known = set(tokens.values())
    sources = (older, config, config.get("extra_special_tokens"))
    names: dict[str, str] = {}
    for source in sources:
        if isinstance(source, dict):
            names |= {key: text for key, value in source.items() if (text := _text(value)) is not None}
    extra: list[str] = []
    for source in (config, older):
        for key in ("extra_special_tokens", "additional_special_tokens"):
            listed = source.get(key)
            extra += [text for item in listed if (text := _text(item))] if isinstance(listed, list) else []
    return SpecialTokens(
        names={key: text for key, text in sorted(names.items()) if text in known and _is_name(key, config)},
        extra=tuple(text for text in dict.fromkeys(extra) if text in known),
        clean_up_spaces=config.get("clean_up_tokenization_spaces") is True,
        split=config.get("split_special_tokens") is True,
    )


def encoding_hash(content: dict[str, Any], special: SpecialTokens) -> str:
    """sha256 (hex) of how text becomes ids and ids text: all of `tokenizer.json` but its vocabulary, and the names."""
    model = content.get("model")
    parts: dict[str, Any] = {
        "files": {name: value for name, value in content.items() if name not in BATCH_SETTINGS | {"model"}},
        "model": _normal_model(model) if isinstance(model, dict) else None,
        "names": special.names,
        "extra": list(special.extra),
        "clean_up_spaces": special.clean_up_spaces,
        "split": special.split,
    }
    added = content.get("added_tokens")
    if isinstance(added, list):
        parts["files"]["added_tokens"] = [{**TOKEN_FLAGS, **item} if isinstance(item, dict) else item for item in added]
    text = json.dumps(_without_nulls(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def require_own_tokenizer(path: Path) -> None:
    """Raise PathError `unsafe_config` where another file than `tokenizer.json` is meant to be the tokenizer."""
    files = tokenizers.tokenizer_config(path).get("fast_tokenizer_files")
    names = files if isinstance(files, list) else [] if files is None else [files]
    if others := [str(name) for name in names if name != tokenizers.TOKENIZER_FILE]:
        raise PathError(
            "unsafe_config",
            f"{tokenizers.CONFIG_FILE} names other files than {tokenizers.TOKENIZER_FILE} as the tokenizer.",
            value=", ".join(others),
            fix=f"Remove fast_tokenizer_files from {tokenizers.CONFIG_FILE}; name the one that is meant "
            f"{tokenizers.TOKENIZER_FILE}.",
        )


def unused_parts(path: Path, tokens: dict[int, str]) -> tuple[str, ...]:
    """What a directory holds that would change its tokenizer or template elsewhere, and is not used here."""
    return tuple(_unused(path, tokens))


def _unused(path: Path, tokens: dict[int, str]) -> Iterator[str]:
    config, known = tokenizers.tokenizer_config(path), set(tokens.values())
    if config.get("auto_map"):
        yield f"auto_map in {tokenizers.CONFIG_FILE} (code is not run)"
    if (path / EXTRA_TEMPLATES).is_dir():
        yield f"{EXTRA_TEMPLATES}/ (one template is used)"
    template = config.get("chat_template")
    if isinstance(template, dict | list) and (len(template) > 1 or tokenizers.chat_template(path) is None):
        yield f"chat templates in {tokenizers.CONFIG_FILE} besides the default one"
    if isinstance(template, str) and tokenizers.chat_template(path) != template:
        yield f"the chat template in {tokenizers.CONFIG_FILE} ({tokenizers.TEMPLATE_FILE} is used)"
    decoder = config.get("added_tokens_decoder")
    named = [_text(item) for item in decoder.values()] if isinstance(decoder, dict) else []
    named += [text for key, value in config.items() if key.endswith("_token") and (text := _text(value))]
    named += list(tokenizers.optional_json(path / ADDED_TOKENS_FILE, tokenizers.MAX_TOKENIZER_CONFIG_BYTES))
    missing = sorted({text for text in named if text is not None and text not in known})
    if missing:
        shown = ", ".join(ascii(text) for text in missing[:3])
        yield f"tokens that are not in {tokenizers.TOKENIZER_FILE}: {shown}" + (" …" if len(missing) > 3 else "")


def _is_name(key: str, config: dict[str, Any]) -> bool:
    extra = config.get("extra_special_tokens")
    return key.endswith("_token") or (isinstance(extra, dict) and key in extra)


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _normal_model(model: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in model.items()
        if name not in MODEL_DEFAULTS or (value or None) != (MODEL_DEFAULTS[name] or None)
    }
    vocabulary, merges = kept.pop("vocab", None), kept.pop("merges", None)
    if isinstance(vocabulary, list):  # Unigram: its scores decide the pieces
        kept["vocab"] = vocabulary
    if isinstance(merges, list):  # "a b", or ["a", "b"] as it is saved now
        kept["merges"] = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
    return kept


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
