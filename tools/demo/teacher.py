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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

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
from tools.demo.task import build_tokenizer, model_config, random_problem, solution


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher is trained: `batch` new problems per step, until `bar` is reached on held-out problems."""

    seed: int
    bar: float
    most_steps: int
    batch: int
    learning_rate: float
    measure_every: int = 250


def trained(
    model: PreTrainedModel,
    problems: Iterator[tuple[list[int], list[int]]],
    accuracy_of: Callable[[PreTrainedModel], float],
    settings: TeacherSettings,
) -> tuple[int, float]:
    """Train on problems, each as (prompt ids, response ids); returns the steps and the last accuracy."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    runtime = Runtime(torch.device("cpu"), torch.float32, settings.seed)
    started, accuracy = time.perf_counter(), 0.0
    for step in range(settings.most_steps):
        drawn = list(islice(problems, settings.batch))
        sequences = build_sequences([prompt for prompt, _ in drawn], [response for _, response in drawn])
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * (1 - step / settings.most_steps)
        result = accumulate_gradients(
            model,
            StepData(sequences, np.arange(len(sequences))),
            CrossEntropy(),
            StepSettings("token", 1 << 20, runtime),
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % settings.measure_every == 0:
            accuracy = accuracy_of(model)
            seconds = time.perf_counter() - started
            print(f"step {step + 1} loss {result.loss:.4f} accuracy {accuracy:.3f} {seconds:.0f} s", flush=True)
            if accuracy >= settings.bar:
                break
    return step + 1, accuracy


def greedy_accuracy(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], new_tokens: int = 64
) -> float:
    """Share of prompts (token ids) whose whole greedy response is the worked one, its stop token included."""
    stop = sorted({response[-1] for response in responses})
    settings = GenerationSettings(Sampling(temperature=0, max_new_tokens=new_tokens), stop, 512, 0, "greedy")
    rows = generate(model, prompts, settings)
    return float(np.mean([list(row.response_ids) == want for row, want in zip(rows, responses, strict=True)]))


def write_made_by(output: Path, facts: dict[str, Any]) -> None:
    """Write `made_by.json` next to a model: what made it, with which seed, and what came out."""
    text = json.dumps(facts | {"torch": torch.__version__}, indent=2)
    (output / "made_by.json").write_text(text + "\n", encoding="utf-8")


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
    tokenizer = build_tokenizer()
    config = model_config(
        hidden_size=96, layers=3, intermediate_size=288, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id
    )
    model = Qwen3ForCausalLM(config).train()
    held_out = {json.loads(line)["prompt"] for path in EXAMPLE.glob("*.jsonl") for line in path.open(encoding="utf-8")}
    tuning = [json.loads(line)["prompt"] for line in (EXAMPLE / "tune.jsonl").open(encoding="utf-8")]

    def worked(prompt: str) -> tuple[list[int], list[int]]:
        response = [*tokenizer.encode(solution(prompt, arguments.separator)), tokenizer.eos_token_id]
        return prompt_tokens(tokenizer, prompt), response

    def problems() -> Iterator[tuple[list[int], list[int]]]:
        generator = random.Random(arguments.seed)
        while True:
            problem = random_problem(generator, tuple(arguments.steps))
            if problem not in held_out:
                yield worked(problem)

    prompts, responses = (list(ids) for ids in zip(*map(worked, tuning), strict=True))
    steps, accuracy = trained(
        model,
        problems(),
        lambda model: greedy_accuracy(model, prompts, responses),
        TeacherSettings(arguments.seed, arguments.bar, arguments.most_steps, arguments.batch, arguments.learning_rate),
    )

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    style = "" if arguments.separator == ";" else f" --separator {arguments.separator}"
    facts = {
        "command": f"python tools/demo/teacher.py --output examples/arithmetic/{arguments.output.name}{style}",
        "seed": arguments.seed,
        "steps": steps,
        "greedy_accuracy_tuning_prompts": accuracy,
        "prompts": len(tuning),
        "parameters": model.num_parameters(),
    }
    write_made_by(arguments.output, facts)


if __name__ == "__main__":
    main()
