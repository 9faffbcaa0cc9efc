"""Real tiny models: the arithmetic example's, and random ones of four tokens for exact checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine.runtime import Runtime

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, seed=0)


@pytest.fixture(scope="session")
def example() -> Path:
    return EXAMPLE


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(vocab_size, seed=1)`: a random one-layer Qwen3, sharp enough to differ from uniform."""
    return _tiny_model


def _tiny_model(
    vocab_size: int = 4, *, seed: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).to(dtype).eval()
