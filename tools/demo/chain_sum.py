"""Make `examples/chain_sum`, the second embedded task: reasoning-gym's `chain_sum`, worked in the thinking.

    python tools/demo/chain_sum.py tokenizer prompts      # a BPE of 2048 tokens, four disjoint prompt sets
    python tools/demo/chain_sum.py teacher                # minutes on one core
    python tools/demo/chain_sum.py student --seed 3       # untrained weights

Needs the extra `tasks`. A response is `<think>\\n4-1=3\\n3+8=11\\n</think>\\n\\n11<|im_end|>`. The tokenizer is what
users have: byte-level BPE with Qwen's splitting, a template with roles and thinking, and two stop tokens, of which the
student's files name only the one that ends a text.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT
from tools.demo.teacher import TeacherSettings, greedy_accuracy, prompt_tokens, trained, write_made_by

TASK = ROOT / "examples" / "chain_sum"
PARAMETERS = {"min_terms": 3, "max_terms": 6, "max_digits": 1}
# Name: seed and size. A prompt that stands in an earlier set, or twice, is left out, so a set has fewer rows.
SETS = {
    "sft": (1, 1000),
    "opd": (2, 2600),
    "tune": (3, 440),
    "retired": (4, 660),
    "retired_again": (5, 660),
    "eval": (6, 660),
}
# Each was the evaluation set until its result with one seed influenced the settings; they are no files any more.
RETIRED = ("retired", "retired_again")
# The teacher was trained before these were drawn.
DRAWN_AFTER_TEACHER = ("retired_again", "eval")
TEACHER_SEED = 1000
SEED_DISTANCE = 100_000
VOCABULARY = 2048
END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
MAX_NEW_TOKENS = 64
# Qwen's: words with the space before them, one digit at a time, punctuation, line breaks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Questions in plain English, from which the tokenizer learns its words.
WORDY = (
    *("chain_sum", "aiw", "basic_arithmetic", "calendar_arithmetic", "coin_flip", "dice", "family_relationships"),
    *("gcd", "gsm_symbolic", "jugs", "knights_knaves", "lcm", "leg_counting", "letter_counting", "needle_haystack"),
    *("number_filtering", "number_sorting", "prime_factorization", "simple_equations", "simple_geometry"),
    *("spell_backward", "syllogism", "time_intervals", "word_sequence_reversal", "word_sorting", "zebra_puzzles"),
)


def entries(seed: int, size: int, parameters: dict[str, Any] = PARAMETERS, task: str = "chain_sum") -> list[Any]:
    """The task's entries, as `reasoning_gym:TASK?seed=…&size=…` has them."""
    return list(reasoning_gym.create_dataset(task, seed=seed * SEED_DISTANCE, size=size, **parameters))


def response(expression: str) -> str:
    """The worked response to an expression such as `4 - 1 + 8`, without the stop token."""
    first, *rest = expression.split()
    value, lines = int(first), ""
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = value + int(term) if sign == "+" else value - int(term)
        lines += f"{value}{sign}{term}={result}\n"
        value = result
    return f"{THINK}\n{lines}{END_THINK}\n\n{value}"


def write_tokenizer() -> None:
    """Train the tokenizer and write it as the teacher's and, with the other stop token as its EOS, the student's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN, END_OF_TURN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special) - 2, initial_alphabet=sorted(alphabet), show_progress=False
    )
    texts = [entry["question"] for task in WORDY for entry in entries(0, 300, {}, task)]
    worked = [response(entry["metadata"]["expression"]) for entry in entries(0, 300)]
    tokenizer.train_from_iterator([*texts, *worked, "system\n", "user\n", "assistant\n"], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (THINK, END_THINK)])
    template = (TASK / "chat_template.jinja").read_text(encoding="utf-8")
    for folder, eos in (("teacher", END_OF_TURN), ("student", END_OF_TEXT)):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=END_OF_TEXT, eos_token=eos, clean_up_tokenization_spaces=False
        )
        fast.chat_template = template
        fast.save_pretrained(TASK / folder)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens from {len(texts)} questions of {len(WORDY)} tasks")


def prompt_sets() -> dict[str, list[dict[str, str]]]:
    """The rows of each set by its name; no prompt is in two sets."""
    seen: set[str] = set()
    sets: dict[str, list[dict[str, str]]] = {name: [] for name in SETS}
    for name, (seed, size) in SETS.items():
        for number, entry in enumerate(entries(seed, size)):
            if entry["question"] not in seen:
                seen.add(entry["question"])
                row = {"id": f"chain_sum-{seed}-{number}", "prompt": entry["question"], "answer": entry["answer"]}
                sets[name].append(row)
    return sets


def write_prompts() -> None:
    """Write all sets as JSONL."""
    for name, rows in prompt_sets().items():
        if name in RETIRED:
            continue
        (TASK / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} prompts")


def model_config(hidden_size: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A tiny Qwen3 with tied embeddings, four heads of attention and two of keys and values."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def worked_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> tuple[list[int], list[int]]:
    """Token ids of a question as the template shows it, and of its worked response with the stop token."""
    expression = re.sub(r".*: (.*) =", r"\1", question)
    ids = tokenizer.encode(response(expression) + END_OF_TURN)
    return prompt_tokens(tokenizer, question), ids


def write_teacher(settings: TeacherSettings) -> None:
    """Train the teacher on new problems, none of a prompt set, until it reaches the bar on the tuning prompts."""
    tokenizer = AutoTokenizer.from_pretrained(TASK / "teacher")
    torch.manual_seed(settings.seed)
    model = Qwen3ForCausalLM(model_config(96, 3, tokenizer)).train()
    sets = prompt_sets()
    held_out = {row["prompt"] for name, rows in sets.items() if name not in DRAWN_AFTER_TEACHER for row in rows}

    def problems() -> Iterator[tuple[list[int], list[int]]]:
        dataset = reasoning_gym.create_dataset(
            "chain_sum", seed=(TEACHER_SEED + settings.seed) * SEED_DISTANCE, size=1 << 40, **PARAMETERS
        )
        for number in range(1 << 40):
            question = dataset[number]["question"]
            if question not in held_out:
                yield worked_ids(tokenizer, question)

    tuning = [worked_ids(tokenizer, row["prompt"]) for row in sets["tune"]]
    prompts, responses = [ids for ids, _ in tuning], [ids for _, ids in tuning]
    print(f"{len(prompts[0])} and {len(responses[0])} tokens: {tokenizer.decode(prompts[0] + responses[0])!r}")
    steps, accuracy = trained(
        model, problems(), lambda model: greedy_accuracy(model, prompts, responses, MAX_NEW_TOKENS), settings
    )
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, END_OF_TEXT)]
    model.generation_config.eos_token_id = stops
    model.save_pretrained(TASK / "teacher")
    facts = {
        "command": f"python tools/demo/chain_sum.py teacher --seed {settings.seed}",
        "seed": settings.seed,
        "steps": steps,
        "greedy_accuracy_tuning_prompts": accuracy,
        "prompts": len(prompts),
        "parameters": model.num_parameters(),
    }
    write_made_by(TASK / "teacher", facts)
    print(f"teacher: {steps} steps, {accuracy:.4f} of {len(prompts)} responses are right in every token")


def write_student(seed: int, output: Path) -> None:
    """Write untrained weights of this initialisation, with the student's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TASK / "student")
    model = Qwen3ForCausalLM(model_config(64, 2, tokenizer))
    model.save_pretrained(output)
    if output != TASK / "student":
        tokenizer.save_pretrained(output)
    command = f"python tools/demo/chain_sum.py student --seed {seed}"
    write_made_by(output, {"command": command, "seed": seed, "parameters": model.num_parameters()})
    print(f"student: {model.num_parameters()} parameters, untrained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["tokenizer", "prompts", "teacher", "student"])
    parser.add_argument("--seed", type=int, default=0, help="of the models' weights and the teacher's problems")
    parser.add_argument("--bar", type=float, default=0.99, help="stop the teacher at this accuracy")
    parser.add_argument("--most-steps", type=int, default=1400, help="over which the learning rate falls to zero")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "tokenizer" in arguments.parts:
        write_tokenizer()
    if "prompts" in arguments.parts:
        write_prompts()
    if "teacher" in arguments.parts:
        bounds = (arguments.bar, arguments.most_steps, arguments.batch, arguments.learning_rate)
        write_teacher(TeacherSettings(arguments.seed, *bounds, measure_every=100))
    if "student" in arguments.parts:
        write_student(arguments.seed, TASK / "student")


if __name__ == "__main__":
    main()
