"""A byte tokenizer with control tokens of every kind, and a chat template with roles."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

START, END, BOS, ROLE = "<|im_start|>", "<|im_end|>", "<s>", "[USER]"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ('[USER]' if m.role == 'user' else '') + m.content|trim }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def made(folder: Path, template: str | None = TEMPLATE, model: object | None = None) -> Path:
    """A tokenizer of bytes with special tokens, one of them in its vocabulary, and added tokens that are none."""
    letters = {c: i for i, c in enumerate([BOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(model or models.BPE({**letters, "im": 257}, [("i", "m")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, "<|endoftext|>", START, END]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (ROLE, "<think>", "</think>", "<b>")])
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": BOS}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
