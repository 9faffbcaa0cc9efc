"""Adapters on one CUDA device, next to peft, and then how fast all shapes train and are scored.

Run from a bare checkout: `python tools/gpu/adapters.py [--part adapters|shapes] [--json FILE]`. Needs torch,
transformers, numpy and pydantic; peft for its rows, bitsandbytes for its kernel. Takes less than six minutes.

1. `adapters`: the 8B shape with random weights, rank 32, on a bf16 and on a 4-bit base: tokens per second, share of the
   same run's bf16 matmul peak, and peak memory against the estimate, optimizer included; and peft on the same base.
2. `shapes`: training of all weights and scoring, each with the micro-batch of those tried that fits it best; and the
   times of the head and of the layers alone, which say where a step's time goes.

`--device cpu --tiny` runs the same code on tiny shapes, to check this script without a GPU; its speeds mean nothing.
Exits with 1 if (on CUDA) a bar is missed.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.data.batches import StepData, build_batch, packed_groups
from opd_mcp.engine.losses.linear_head import LossRows, one_pass_losses, row_scores
from opd_mcp.engine.losses.objectives import Sampled
from opd_mcp.engine.models.attention import hidden_rows, use_packed_attention
from opd_mcp.engine.models.compiled import compile_layers
from opd_mcp.engine.models.embeddings import model_head
from opd_mcp.engine.models.lora import add_adapter, quantise
from opd_mcp.engine.models.nf4 import kernel_name
from opd_mcp.engine.runtime import Runtime, hardware_name, is_out_of_memory, matmul_peak
from opd_mcp.engine.training.activations import checkpointed_activations, step_memory
from opd_mcp.engine.training.optim import build_optimizer
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients, main_gradient, training_flops
from opd_mcp.schemas.recipes import AdapterRecipe, OptimizerRecipe
from tools.gpu.check import PROMPT, SHAPES, VOCAB, Shape, failures, long_rows, random_model, shape_config
from tools.gpu.timing import median_seconds

LARGE: Shape = (4096, 36, 32, 12288)
TINY: Shape = (64, 2, 2, 128)
RECIPE = AdapterRecipe(rank=32)
# bars on CUDA: what is aimed at, claimed only where it was measured
LEAST_ADAPTER, MOST_BYTES = 0.55, 40 * 10**9
LEAST_TRAINING = {"0.6B": 0.50, "1.7B": 0.60, "4B": 0.68}
LEAST_SCORING = {"4B": 0.75, "8B": 0.75}
ROUNDS = 2


@dataclass(frozen=True)
class Bench:
    """What is measured on: the device, its matmul peak, the vocabulary, tokens of a row, and of the micro-batches."""

    runtime: Runtime
    peak: float
    vocab: int
    row: int
    budgets: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where models and batches are."""
        return self.runtime.device

    def rows(self, tokens: int) -> StepData:
        """Rows of equal length that fill one micro-batch of so many tokens."""
        count = max(1, tokens // self.row)
        return StepData(long_rows(count, self.row - PROMPT, self.vocab), np.arange(count))


def release() -> None:
    """Give the device's memory back: compiled layers hold one another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The allocated peak of a run, after one that does not count; 0 on a CPU."""
    run()
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def random_base(shape: Shape, bench: Bench) -> PreTrainedModel:
    """An untied random Qwen3 in bf16, made on the device."""
    with torch.device(bench.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Qwen3ForCausalLM(shape_config(shape, bench.vocab, tied=False))
        finally:
            torch.set_default_dtype(before)


def adapted_base(shape: Shape, bench: Bench, *, packed: bool) -> PreTrainedModel:
    """The base, in 4 bits where `packed`, with an adapter on all linear layers, compiled as `load_model` does."""
    model = random_base(shape, bench)
    if packed:
        quantise(model, bench.device)
    add_adapter(model, RECIPE, seed=0)
    model.train()
    assert use_packed_attention(model), "a Qwen3 model packs"
    if (problem := compile_layers(model, autocast=True)) is not None:
        failures.append(f"layers of {shape}, {'4-bit' if packed else 'bf16'} base: {problem}")
    return model


def our_adapter_step(model: PreTrainedModel, bench: Bench, tokens: int, policy: str) -> dict[str, Any]:
    """One whole step, optimizer included: speed, and the peak against the plan's estimate."""
    data, optimizer = bench.rows(tokens), build_optimizer(model, OptimizerRecipe(), seed=0)
    settings = StepSettings("token", tokens, bench.runtime)
    parts = step_memory(model, "fp32_master", policy, tokens=tokens, runtime=bench.runtime)  # type: ignore[arg-type]

    def step() -> None:
        accumulate_gradients(model, data, Sampled(10.0), settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with checkpointed_activations(model, parts.policy):
        memory = peak_bytes(step, bench.device)
        seconds = median_seconds({"step": step}, bench.device, ROUNDS)["step"]
    lengths = data.sequences.lengths().tolist()
    flops = training_flops(model, lengths, len(data.sequences.response_ids))
    return {
        "tokens": tokens,
        "checkpointing": parts.policy,
        "tokens_per_second": sum(lengths) / seconds,
        "utilisation": flops / seconds / bench.peak,
        "peak_bytes": memory,
        "estimated_bytes": parts.total,
        "share_of_estimate": memory / parts.total,
    }


def peft_step(bench: Bench, shape: Shape, tokens: int) -> dict[str, Any]:
    """peft and plain transformers on the same base and rows: SDPA, full logits, gradient checkpointing, autocast."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RECIPE.rank, lora_alpha=2 * RECIPE.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    base = random_base(shape, bench)
    base.set_attn_implementation("sdpa")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, config).train()
    data = bench.rows(tokens).sequences
    ids = np.stack([np.concatenate([data.prompt(row), data.response(row)]) for row in range(len(data))])
    rows = torch.from_numpy(ids.astype(np.int64)).to(bench.device)
    teacher = torch.full((rows.shape[0], rows.shape[1] - PROMPT), -11.0, device=bench.device)
    optimizer = build_optimizer(model, OptimizerRecipe(), seed=0)

    def step() -> None:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits[:, PROMPT - 1 : -1]
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(2, rows[:, PROMPT:, None])[:, :, 0]
        advantage = (teacher - logprobs).clamp(-10, 10).detach()
        (-(advantage * logprobs).sum() / teacher.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    memory = peak_bytes(step, bench.device)
    seconds = median_seconds({"step": step}, bench.device, ROUNDS)["step"]
    return {"tokens": tokens, "tokens_per_second": rows.numel() / seconds, "peak_bytes": memory}


def tried(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run measured, printed; or that its memory ran out."""
    try:
        found = run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = {"out_of_memory": True}
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    print(f"{name:32} {json.dumps(shown)}", flush=True)
    release()
    return found


def adapters(bench: Bench, shape: Shape) -> dict[str, Any]:
    """The first part: ours on both bases at each size, and peft."""
    found: dict[str, Any] = {"kernel": kernel_name(bench.device)}
    small, large = bench.budgets[0], bench.budgets[1]
    for base in ("bf16", "nf4"):
        model = adapted_base(shape, bench, packed=base == "nf4")
        for tokens, policy in ((small, "auto"), (large, "auto"), (large, "full")):
            name = f"{base}, {tokens}, {policy}"
            found[name] = tried(name, lambda m=model, t=tokens, p=policy: our_adapter_step(m, bench, t, p))
        del model
        release()
    if find_spec("peft") is None:
        print("peft is not installed: its rows are left out", flush=True)
        return found
    for tokens in (small, large):
        found[f"peft, {tokens}"] = tried(f"peft, {tokens}", lambda t=tokens: peft_step(bench, shape, t))
    return found


def trained(model: PreTrainedModel, bench: Bench, tokens: int) -> dict[str, Any]:
    """Forward and backward of one micro-batch of all weights, and the head and the layers alone."""
    data, runtime = bench.rows(tokens), bench.runtime
    parts = step_memory(model, "fp32_master", "auto", tokens=tokens, runtime=runtime)
    batch = build_batch(data.sequences, data.indices, bench.device)
    head = model_head(model, torch.bfloat16)
    states = torch.randn(len(batch.rows), head.weight.shape[1], device=bench.device)
    rows = LossRows(batch.targets, torch.full((len(batch.rows),), 1e-4, device=bench.device), batch.columns)

    def step() -> None:
        accumulate_gradients(model, data, Sampled(10.0), StepSettings("token", tokens, runtime))

    def head_alone() -> None:
        hidden = states.detach().requires_grad_()
        one_pass_losses(head, hidden, rows, Sampled(10.0), main_grad=main_gradient(head.weight)).total.backward()

    def layers_alone() -> None:
        table = main_gradient(model.get_input_embeddings().weight)
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows, main_grad=table)
        hidden.float().sum().backward()

    with checkpointed_activations(model, parts.policy):
        runs = {"step": step, "head": head_alone, "layers": layers_alone}
        seconds = median_seconds(runs, bench.device, ROUNDS)
    model.zero_grad(set_to_none=True)
    flops = training_flops(model, data.sequences.lengths().tolist(), len(data.sequences.response_ids))
    head_flops = 6.0 * head.weight.numel() * len(batch.rows)
    return {
        "tokens": tokens,
        "checkpointing": parts.policy,
        "tokens_per_second": len(data.sequences.response_ids) / seconds["step"],
        "utilisation": flops / seconds["step"] / bench.peak,
        "head_share_of_time": seconds["head"] / seconds["step"],
        "head_utilisation": head_flops / seconds["head"] / bench.peak,
        "layers_utilisation": (flops - head_flops) / seconds["layers"] / bench.peak,
        "rest_share_of_time": 1 - (seconds["head"] + seconds["layers"]) / seconds["step"],
    }


@torch.no_grad()
def scored(model: PreTrainedModel, bench: Bench, tokens: int) -> dict[str, Any]:
    """Log-probs of one micro-batch by a bf16 model."""
    data = bench.rows(tokens)
    head = model_head(model)

    def score() -> list[Tensor]:
        found = []
        for group in packed_groups(data.sequences.lengths(), data.indices, tokens):
            batch = build_batch(data.sequences, group, bench.device)
            hidden = hidden_rows(model, batch.input_ids, batch.lengths, batch.rows)
            found.append(row_scores(head, hidden, batch.targets).logprobs)
        return found

    seconds = median_seconds({"score": score}, bench.device, ROUNDS)["score"]
    lengths = data.sequences.lengths().tolist()
    flops = training_flops(model, lengths, len(data.sequences.response_ids)) / 3
    return {
        "tokens": tokens,
        "tokens_per_second": len(data.sequences.response_ids) / seconds,
        "utilisation": flops / seconds / bench.peak,
    }


def best(name: str, bench: Bench, measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The micro-batch of those tried with the highest utilisation, with what the others reached."""
    runs = [tried(f"{name}, {tokens}", lambda t=tokens: measure(t)) for tokens in bench.budgets]
    fitting = [found for found in runs if "utilisation" in found]
    if not fitting:
        return {"out_of_memory": True}
    others = {found["tokens"]: round(found["utilisation"], 3) for found in fitting}
    return max(fitting, key=lambda found: found["utilisation"]) | {"utilisation_by_tokens": others}


def shapes(bench: Bench, wanted: dict[str, Shape]) -> dict[str, Any]:
    """The second part: training and scoring of every shape."""
    table: dict[str, Any] = {}
    for name, shape in wanted.items():
        model = random_model(shape, bench.device, bench.vocab, training=True)
        training = best(f"{name} training", bench, lambda tokens, m=model: trained(m, bench, tokens))
        model.zero_grad(set_to_none=True)
        scorer = model.to(torch.bfloat16).eval()
        scoring = best(f"{name} scoring", bench, lambda tokens, m=scorer: scored(m, bench, tokens))
        table[name] = {"training": training, "scoring": scoring}
        del model, scorer
        release()
    return table


def judge_adapters(found: dict[str, Any], bench: Bench) -> None:
    """Note the first part's missed bars."""
    large = bench.budgets[1]
    reached = max(found[f"bf16, {tokens}, auto"].get("utilisation", 0.0) for tokens in bench.budgets[:2])
    if reached < LEAST_ADAPTER:
        failures.append(f"8B with an adapter: {reached:.2f} of the peak is below {LEAST_ADAPTER}")
    for name, row in found.items():
        if isinstance(row, dict) and row.get("share_of_estimate", 0.0) > 1.0:
            failures.append(f"{name}: the peak is {row['share_of_estimate']:.2f} of the estimate")
    for base in ("bf16", "nf4"):
        memory = found[f"{base}, {large}, full"].get("peak_bytes", MOST_BYTES)
        if memory >= MOST_BYTES:
            failures.append(f"{base} base, {large} tokens: {memory / 1e9:.1f} GB, not under {MOST_BYTES / 1e9:.0f}")


def judge_shapes(table: dict[str, Any]) -> None:
    """Note the second part's missed bars."""
    for kind, bars in (("training", LEAST_TRAINING), ("scoring", LEAST_SCORING)):
        for name, bar in bars.items():
            reached = table[name][kind].get("utilisation", 0.0)
            if reached < bar:
                failures.append(f"{name} {kind}: {reached:.2f} of the peak is below {bar}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, with --device cpu")
    parser.add_argument("--part", choices=["adapters", "shapes"], help="only this one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, started = torch.device(arguments.device), time.perf_counter()
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here; --device cpu --tiny checks the script itself.")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("A CPU takes days for an 8B step; add --tiny.")
    if device.type == "cpu":
        torch.set_num_threads(1)
    peak = matmul_peak(device, torch.bfloat16)
    runtime = Runtime(device, torch.bfloat16, seed=0)
    full = Bench(runtime, peak, VOCAB, 4096, (8192, 16_384, 32_768))
    bench = Bench(runtime, peak, 128, PROMPT + 32, (160, 320)) if arguments.tiny else full
    report: dict[str, Any] = {"device": hardware_name(device), "torch": torch.__version__, "bf16_matmul_peak": peak}
    print(f"bf16 matmul peak {peak / 1e12:.3g} TFLOP/s", flush=True)
    if arguments.part != "shapes":
        report["adapters"] = adapters(bench, TINY if arguments.tiny else LARGE)
    if arguments.part != "adapters":
        wanted = {"tiny": TINY} if arguments.tiny else {**SHAPES, "8B": LARGE}
        report["shapes"] = shapes(bench, wanted)
    report["seconds"] = time.perf_counter() - started
    if not arguments.tiny:
        if "adapters" in report:
            judge_adapters(report["adapters"], bench)
        if "shapes" in report:
            judge_shapes(report["shapes"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in failures:
        print(f"missed: {line}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
