"""TRL's `DistillationTrainer` on one student: live, full-vocabulary reverse KL; what `measure.py` runs as `trl_live`.

It trains on the same SFT student, teacher, prompts, steps, batch, rate with its warm-up, and sampling as the arms next
to it, in float32 on one thread, saves the student to `--output`, and prints one JSON line with the training's processor
seconds.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_mcp.engine.models.loading import copy_tokenizer
from opd_mcp.identity.data.reading import read_prompts
from opd_mcp.identity.data.rows import PromptRow


def prompt_of(row: PromptRow, chat: bool) -> object:
    """A prompt as TRL takes it: text, or the turns of a chat, which a plain prompt is too where there is a template."""
    if row.prompt is None:
        return list(row.messages or ())
    return [{"role": "user", "content": row.prompt}] if chat else row.prompt


def trained(options: argparse.Namespace) -> float:
    """Train, save the student, and say how many processor seconds the training took."""
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(1)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    rows = Dataset.from_list(
        [{"prompt": prompt_of(row, bool(tokenizer.chat_template))} for row in read_prompts(options.prompts)]
    )
    settings = DistillationConfig(
        output_dir=str(options.output) + "-trainer",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,
        learning_rate=options.rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        max_completion_length=options.tokens,
        temperature=options.temperature,
        adam_beta2=0.98,
        weight_decay=0.0,
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=settings, train_dataset=rows, processing_class=tokenizer
    )
    begun = time.process_time()
    trainer.train()
    spent = time.process_time() - begun
    shutil.rmtree(options.output, ignore_errors=True)
    trainer.model.save_pretrained(options.output)
    copy_tokenizer(options.student, options.output)
    shutil.copyfile(options.student / "generation_config.json", options.output / "generation_config.json")
    return spent


def main() -> None:
    """Train and print the cost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("student", "teacher", "prompts", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("steps", "batch", "tokens", "seed", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--schedule", default="linear")
    print(json.dumps({"processor_seconds": round(trained(parser.parse_args()), 3)}))


if __name__ == "__main__":
    main()
