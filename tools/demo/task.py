"""The embedded task: left-to-right mod-10 chains, solved step by step, with a verifiable answer.

Prompt `3+8-4*2=?`, response `3+8=1;1-4=7;7*2=4;#4<eos>`.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

CHARACTERS = "0123456789+-*=?;,#"
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}"
    "{{ '<eos>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPERATIONS = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10, "*": lambda a, b: (a * b) % 10}


def random_problem(generator: random.Random, steps: tuple[int, int]) -> str:
    """A prompt with between `steps[0]` and `steps[1]` operations."""
    text = str(generator.randrange(10))
    for _ in range(generator.randint(*steps)):
        text += generator.choice("+-*") + str(generator.randrange(10))
    return text + "=?"


def solution(prompt: str, separator: str = ";") -> str:
    """The worked response without EOS."""
    chain = prompt.removesuffix("=?")
    value, worked = int(chain[0]), ""
    for operation, digit in zip(chain[1::2], chain[2::2], strict=True):
        result = OPERATIONS[operation](value, int(digit))
        worked += f"{value}{operation}{digit}={result}{separator}"
        value = result
    return f"{worked}#{value}"


def answer(prompt: str) -> str:
    """The final digit."""
    return solution(prompt)[-1]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, four special tokens, a chat template."""
    vocab = {token: index for index, token in enumerate([PAD, EOS, USER, ASSISTANT, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(*, hidden_size: int, layers: int, intermediate_size: int, vocab_size: int, eos_id: int) -> Qwen3Config:
    """A tiny Qwen3 with tied embeddings and four heads."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        intermediate_size=intermediate_size,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=0,
        use_cache=True,
    )
