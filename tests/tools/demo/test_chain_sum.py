"""The files of the second task: sets, worked responses, tokenizer, template, and two stop tokens."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from opd_mcp.engine.models.loading import load_tokenizer

TASK = Path(__file__).resolve().parents[3] / "examples" / "chain_sum"
SIZES = {"sft": 991, "opd": 2517, "tune": 418, "eval": 596}
QUESTION = "State the final answer to the following arithmetic problem: 4 - 7 + 9 ="


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TASK / "teacher")


def test_no_prompt_is_in_two_sets_or_twice_in_one():
    sets = {name: [row["prompt"] for row in rows_of(name)] for name in SIZES}
    assert {name: len(prompts) for name, prompts in sets.items()} == SIZES
    assert all(len(set(prompts)) == len(prompts) for prompts in sets.values())
    for one, other in itertools.combinations(sets, 2):
        assert not set(sets[one]) & set(sets[other]), (one, other)


@pytest.mark.needs("reasoning_gym")
def test_the_sets_are_the_tasks_rows_and_the_responses_are_right():
    from tools.demo import chain_sum

    sets = chain_sum.prompt_sets()
    retired = {row["prompt"] for name in chain_sum.RETIRED for row in sets.pop(name)}
    assert len(retired) == 619 + 601
    for name, rows in sets.items():
        assert rows == rows_of(name)
        assert retired.isdisjoint(row["prompt"] for row in rows)
    for row in rows_of("tune"):
        expression = row["prompt"].rpartition(": ")[2].removesuffix(" =")
        thinking, _, answer = chain_sum.response(expression).partition("</think>\n\n")
        assert answer == row["answer"]
        for line in thinking.splitlines()[1:]:
            worked, result = line.split("=")
            sign = worked.index("+", 1) if "+" in worked[1:] else worked.index("-", 1)
            assert int(worked[:sign]) + int(worked[sign:]) == int(result)


def test_the_tokenizer_is_a_bpe_that_gives_every_text_back(tokenizer):
    assert len(tokenizer) == 2048
    for text in (QUESTION, "Zwölf Boxkämpfer\n\t😀 jagen Виктор", "12345 = 1 2 3"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" final answer")) == 2  # words of the questions are whole
    assert len(tokenizer.encode("123")) == 3  # one digit at a time


def test_the_template_has_roles_and_thinking(tokenizer):
    turns = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2", "reasoning_content": "1+1=2"},
    ]

    def shown(messages, **arguments):
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    first = "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"
    assert shown(turns[:2], add_generation_prompt=True) == first
    assert shown(turns[:2], add_generation_prompt=True, enable_thinking=False) == f"{first}<think>\n\n</think>\n\n"
    assert shown(turns) == f"{first}<think>\n1+1=2\n</think>\n\n2<|im_end|>\n"
    written = {"role": "assistant", "content": "<think>\n1+1=2\n</think>\n\n2"}
    assert shown([*turns[:2], written]) == shown(turns)
    assert "1+1=2" not in shown([*turns, {"role": "user", "content": "And 2 + 2 ="}], add_generation_prompt=True)
    with pytest.raises(Exception, match="Unknown role: tool"):
        shown([{"role": "tool", "content": "2"}])


def test_the_teacher_stops_at_either_token_and_the_students_files_name_one():
    ids = {
        name: load_tokenizer(TASK / "teacher").convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")
    }
    assert GenerationConfig.from_pretrained(TASK / "teacher").eos_token_id == [*ids.values()]
    assert GenerationConfig.from_pretrained(TASK / "student").eos_token_id == ids["<|endoftext|>"]
    assert [load_tokenizer(TASK / name).eos_token for name in ("teacher", "student")] == [*ids]
