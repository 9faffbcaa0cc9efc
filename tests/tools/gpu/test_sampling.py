"""`tools/gpu/sampling.py` on a CPU: everything but the speeds themselves."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tools.gpu import sampling

SCRIPT = Path(sampling.__file__)


def test_the_script_reports_both_parts(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    [batch] = found["tiny"]
    assert (batch["rows"], batch["new_tokens"]) == (4, 8)
    assert min(batch["ours"], batch["hf_static_cache"], batch["roofline_share"]) > 0
    assert found["joining"]["steps"]["joining"] < found["joining"]["steps"]["batches"]
    assert found["joining"]["log-probs"]["value"] < 0.01


def test_a_step_reads_the_weights_once_and_every_row_that_is_cached() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=12, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **sizes
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    weights = 2 * (sum(each.numel() for each in model.parameters()) - 12 * 16)
    prompts = [[1, 2, 3], [4]]
    assert sampling.step_bytes(model, prompts, 0) == weights + 2 * 3 * 8 * 2 * 4
    assert sampling.step_bytes(model, prompts, 5) == weights + 2 * 3 * 8 * 2 * (4 + 2 * 5)
