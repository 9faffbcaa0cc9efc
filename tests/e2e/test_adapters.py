"""A machine too small to train all weights: the plan offers LoRA, the agent accepts, and peft loads the result."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import anyio
import pytest
import torch
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_mcp.engine.models.loading import copy_tokenizer, load_model
from opd_mcp.engine.runtime import Runtime

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
SMALL_MACHINE = Path(__file__).resolve().parents[1] / "stand_ins" / "small_machine.py"
SETTINGS = {
    "responses.limit": 4,
    "responses.sampling.max_new_tokens": 8,
    "sft.steps": 2,
    "sft.batch_size": 2,
    "sft.on_truncated": "keep",
    "rollout.count": 4,
    "rollout.sampling.max_new_tokens": 8,
    "distill.steps": 2,
    "distill.batch_size": 2,
    "benchmark.samples_per_prompt": 0,
    "benchmark.kl_prompts": 2,
    "benchmark.limit": 2,
    "benchmark.sampling.max_new_tokens": 8,
}


@pytest.fixture
def student(world) -> Path:
    """A random model whose weights and moments, not its activations, decide what fits: 17 million values."""
    torch.manual_seed(0)
    config = json.loads((EXAMPLES / "student" / "config.json").read_text())
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "layer_types": None}
    path = world.data / "larger"
    Qwen3ForCausalLM(Qwen3Config(**(config | sizes | heads))).save_pretrained(path)
    copy_tokenizer(EXAMPLES / "student", path)
    return path


async def test_an_agent_on_a_small_machine_accepts_lora_and_gets_an_adapter_that_peft_loads(world, student):
    room = world.root / "room"
    room.write_text(str(1 << 40))
    server = StdioServerParameters(
        command=sys.executable,
        args=[str(SMALL_MACHINE), str(room), "serve", "--allow-root", str(world.data)],
        env=world.environment() | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    arguments = world.plan_arguments(student=str(student), overrides=SETTINGS)
    async with Client(server) as client:
        with anyio.fail_after(300):
            roomy = (await client.call_tool("plan_distillation", arguments)).structured_content
            full, lora = (option["peak_memory_bytes"] for option in roomy["fits"][:2])
            assert lora < full
            room.write_text(str((lora + full) // 2))

            blocked = (await client.call_tool("plan_distillation", arguments)).structured_content
            assert [finding["code"] for finding in blocked["blocking"]] == ["not_enough_memory"]
            assert [(option["name"], option["fits"]) for option in blocked["fits"][:2]] == [
                ("full", False),
                ("lora", True),
            ]
            offered = blocked["next_action"]
            assert offered["arguments"]["overrides"]["distill.adapter"] == {}
            assert "LoRA" in offered["why"]

            # the agent accepts, and wants the adapter itself
            accepted = offered["arguments"]
            accepted["overrides"] |= {"distill.adapter": {"save": "adapter"}}
            plan = (await client.call_tool(offered["tool"], accepted)).structured_content
            assert not plan.get("blocking"), plan["blocking"]
            start = plan["next_action"]
            status = (await client.call_tool(start["tool"], start["arguments"])).structured_content
            while status["state"] in ("queued", "running"):
                following = status["next_action"]
                status = (await client.call_tool(following["tool"], following["arguments"])).structured_content
            assert status["state"] == "succeeded", status

    [report] = (world.workspace / "artifacts" / "report").glob("*/report.md")
    assert (
        "distilled: a LoRA adapter of rank 32 on all linear layers was trained from zero (distill)"
        in report.read_text()
    )
    adapter = next((world.workspace / "artifacts" / "model").glob("model-lightning-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = Path(config["base_model_name_or_path"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert config["r"] == 32
    assert len(tensors) == 2 * 7 * 4
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    if find_spec("peft") is not None:  # make test-extras
        require_loaded_by_peft(base, adapter)


def require_loaded_by_peft(base: Path, adapter: Path) -> None:
    """Plain transformers and peft compute what this engine does."""
    from peft import PeftModel

    ids = torch.arange(1, 12)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    runtime = Runtime(torch.device("cpu"), torch.float32, seed=0)
    with torch.no_grad():
        before = plain(ids).logits
        loaded = PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
        ours = load_model(adapter, runtime).model(ids).logits
    assert not torch.equal(loaded, before)
    assert (loaded - ours).abs().max() <= 1e-6 * ours.abs().max()
