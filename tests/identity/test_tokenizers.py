"""Tokenizers from their files."""

import json
from pathlib import Path

import pytest

from opd_mcp.identity.tokenizers import (
    chat_template,
    eos_token_ids,
    map_difference,
    require_unused,
    special_differences,
    token_map,
    token_map_hash,
)
from opd_mcp.schemas.errors import ConsistencyError, IntegrityError
from opd_mcp.schemas.recipes import PromptingRecipe


def test_the_token_map_holds_vocabulary_and_added_tokens(make_model):
    model = make_model("teacher")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 9, "content": "<think>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    tokens = token_map(model)
    assert tokens[2] == "0"
    assert tokens[9] == "<think>"


def test_a_unigram_vocabulary_is_a_list(make_model):
    model = make_model("teacher")
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}))
    assert token_map(model) == {0: "<unk>", 1: "a"}


def test_equal_tokens_agree_whatever_the_weights(make_model):
    teacher, student = make_model("teacher", seed=1), make_model("student", seed=2)
    assert special_differences(teacher, student) == ()


def test_the_first_differing_id_is_named_with_both_tokens(make_model):
    teacher = make_model("teacher")
    student = make_model("student", vocabulary=("<pad>", "<eos>", "0", "1", "2", "-", "="))
    with pytest.raises(ConsistencyError, match=r"id 5: teacher has '\+', student has '-'") as caught:
        special_differences(teacher, student)
    assert caught.value.code == "tokenizer_mismatch"


def test_a_token_that_only_one_side_has_is_a_difference(make_model):
    teacher = make_model("teacher")
    student = make_model("student", vocabulary=("<pad>", "<eos>", "0", "1", "2", "+"))
    difference = map_difference(token_map(teacher), token_map(student))
    assert difference is not None
    assert (difference.id, difference.teacher, difference.student) == (6, "=", None)


def test_the_hash_does_not_confuse_neighbouring_tokens():
    assert token_map_hash({0: "ab", 1: "c"}) != token_map_hash({0: "a", 1: "bc"})
    assert token_map_hash({0: "a", 1: "b"}) == token_map_hash({1: "b", 0: "a"})
    assert token_map_hash({0: "\ud800"}) != token_map_hash({0: "?"})


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": null}}}'])
def test_a_damaged_tokenizer_is_named(make_model, content):
    model = make_model("teacher")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        token_map(model)


def test_the_eos_comes_from_the_generation_config_then_the_config_then_the_tokenizer(make_model):
    model = make_model("teacher")
    tokens = token_map(model)
    assert eos_token_ids(model, tokens) == (1,)
    (model / "generation_config.json").write_text('{"eos_token_id": [6, 1]}')
    assert eos_token_ids(model, tokens) == (1, 6)
    (model / "generation_config.json").write_text("{}")
    (model / "config.json").write_text('{"text_config": {"eos_token_id": 4}}')
    assert eos_token_ids(model, tokens) == (4,)
    (model / "config.json").write_text("{}")
    assert eos_token_ids(model, tokens) == (1,)
    (model / "tokenizer_config.json").unlink()
    assert eos_token_ids(model, tokens) == ()


def test_the_chat_template_file_wins_over_the_one_in_the_config(make_model):
    model = make_model("teacher")
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template(model) == "{{ messages[0].content }}"
    (model / "chat_template.jinja").unlink()
    assert chat_template(model) == "a"
    (model / "tokenizer_config.json").unlink()
    assert chat_template(model) is None


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|box_start|>")
DISTILL = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>")


def with_added(model: Path, added: tuple[str, ...], *, size: int = 40, special: bool = True) -> Path:
    """The model with these added tokens after its vocabulary, of a config with so many embeddings."""
    content = json.loads((model / "tokenizer.json").read_text())
    first = len(content["model"]["vocab"])
    content["added_tokens"] = [
        {"id": first + number, "content": text, "special": special} for number, text in enumerate(added)
    ]
    (model / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    return model


@pytest.mark.parametrize(
    ("teacher_s", "student_s", "count"),
    [
        ((*QWEN, "<tool_response>", "</tool_response>", "<think>", "</think>"), QWEN, 4),  # Qwen3 and Qwen2.5
        (QWEN, (*QWEN, "<think>", "</think>"), 2),
        (DISTILL, QWEN, 5),  # R1-Distill and Qwen2.5
        ((*QWEN[:3], "<a>"), (*QWEN[:3], "<b>"), 1),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_alone_may_differ_where_no_prompt_has_them(make_model, teacher_s, student_s, count, special):
    teacher = with_added(make_model("teacher"), teacher_s, special=special)
    student = with_added(make_model("student"), student_s, special=special)
    found = special_differences(teacher, student)
    assert len(found) == count
    ids = [difference.id for difference in found]
    require_unused(found, set(range(min(ids))), PromptingRecipe(), student)
    with pytest.raises(ConsistencyError, match=r"tokenizer_mismatch.*prompts use it.*differing_tokens") as caught:
        require_unused(found, ids[-1:], PromptingRecipe(), student)
    assert repr(found[-1].teacher or "no such id").strip("'")[:3] in str(caught.value)
    require_unused(found, ids, PromptingRecipe(differing_tokens="learn"), student)


@pytest.mark.parametrize(
    ("teacher_s", "student_s", "size", "special"),
    [
        (("word",), ("other",), 40, False),  # added tokens that ordinary text has
        ((*QWEN, "<think>"), QWEN, 12, True),  # an id for which the student has no embedding
        (("<a>", "two words"), ("<a>",), 40, False),
    ],
)
def test_other_differences_are_refused(make_model, teacher_s, student_s, size, special):
    teacher = with_added(make_model("teacher"), teacher_s, special=special)
    student = with_added(make_model("student"), student_s, size=size, special=special)
    with pytest.raises(ConsistencyError, match="tokenizer_mismatch"):
        special_differences(teacher, student)
