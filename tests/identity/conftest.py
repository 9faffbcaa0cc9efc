"""Small real model directories: safetensors, config and tokenizer files, made without torch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

MakeModel = Callable[..., Path]

VOCABULARY = ("<pad>", "<eos>", "0", "1", "2", "+", "=")


def write_model(directory: Path, *, seed: int, vocabulary: tuple[str, ...] = VOCABULARY) -> Path:
    """A one-layer model whose weights depend on the seed only."""
    directory.mkdir(parents=True)
    config = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": random.normal(size=(16, 8)).astype("float32"),
        "model.layers.0.mlp.up_proj.weight": random.normal(size=(300, 300)).astype("float32"),
        "model.norm.weight": random.normal(size=(8,)).astype("float32"),
    }
    save_file(tensors, directory / "model.safetensors")
    added = [{"id": i, "content": token, "special": True} for i, token in enumerate(vocabulary[:2])]
    tokenizer = {
        "added_tokens": added,
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(vocabulary)}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """`make_model("teacher", seed=1)`: a model directory of that name."""

    def make(name: str, *, seed: int = 0, vocabulary: tuple[str, ...] = VOCABULARY) -> Path:
        return write_model(tmp_path / name, seed=seed, vocabulary=vocabulary)

    return make
