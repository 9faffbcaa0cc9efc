"""Train a demo teacher until its greedy accuracy on held-out problems reaches a bar, and save it.

    python tools/demo/teacher.py --output examples/arithmetic/teacher
    python tools/demo/teacher.py --output examples/arithmetic/teacher_other_style --separator ,

Each step draws new training problems, never a prompt of the sets in `examples/arithmetic`.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.engine.data.batches import StepData
from opd_mcp.engine.data.sequences import build_sequences
from opd_mcp.engine.generation.batch_state import GenerationSettings
from opd_mcp.engine.generation.generator import generate
from opd_mcp.engine.losses.objectives import CrossEntropy
from opd_mcp.engine.runtime import Runtime
from opd_mcp.engine.training.step import StepSettings, accumulate_gradients
from opd_mcp.schemas.recipes import Sampling
from tools import EXAMPLE
from tools.demo.task import EOS, build_tokenizer, model_config, random_problem, solution


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def greedy_accuracy(model, tokenizer, prompts: list[str], separator: str) -> float:
    """Share of prompts whose whole greedy response is the worked solution."""
    rows = generate(
        model,
        [prompt_tokens(tokenizer, prompt) for prompt in prompts],
        GenerationSettings(Sampling(temperature=0, max_new_tokens=64), [tokenizer.eos_token_id], 512, 0, "greedy"),
    )
    texts = [tokenizer.decode(row.response_ids) for row in rows]
    return float(np.mean([text == solution(p, separator) + EOS for text, p in zip(texts, prompts, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--separator", default=";", choices=[";", ","])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bar", type=float, default=0.98, help="stop at this greedy accuracy")
    parser.add_argument("--most-steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 6), help="operations of a training problem")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    generator = random.Random(arguments.seed)
    tokenizer = build_tokenizer()
    config = model_config(
        hidden_size=96, layers=3, intermediate_size=288, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id
    )
    model = Qwen3ForCausalLM(config).train()
    held_out = {json.loads(line)["prompt"] for path in EXAMPLE.glob("*.jsonl") for line in path.open(encoding="utf-8")}
    tuning = [json.loads(line)["prompt"] for line in (EXAMPLE / "tune.jsonl").open(encoding="utf-8")]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    runtime = Runtime(torch.device("cpu"), torch.float32, arguments.seed)
    started, accuracy = time.perf_counter(), 0.0
    for step in range(arguments.most_steps):
        prompts: list[str] = []
        while len(prompts) < arguments.batch:
            problem = random_problem(generator, tuple(arguments.steps))
            if problem not in held_out:
                prompts.append(problem)
        sequences = build_sequences(
            [prompt_tokens(tokenizer, prompt) for prompt in prompts],
            [[*tokenizer.encode(solution(prompt, arguments.separator)), tokenizer.eos_token_id] for prompt in prompts],
        )
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * warm * (1 - step / arguments.most_steps)
        result = accumulate_gradients(
            model,
            StepData(sequences, np.arange(len(sequences))),
            CrossEntropy(),
            StepSettings("token", 1 << 20, runtime),
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0:
            accuracy = greedy_accuracy(model, tokenizer, tuning, arguments.separator)
            print(
                f"step {step + 1} loss {result.loss:.4f} accuracy {accuracy:.3f} {time.perf_counter() - started:.0f} s"
            )
            if accuracy >= arguments.bar:
                break

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    style = "" if arguments.separator == ";" else f" --separator {arguments.separator}"
    made_by = {
        "command": f"python tools/demo/teacher.py --output examples/arithmetic/{arguments.output.name}{style}",
        "seed": arguments.seed,
        "steps": step + 1,
        "greedy_accuracy_tuning_prompts": accuracy,
        "prompts": len(tuning),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
    }
    (arguments.output / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
